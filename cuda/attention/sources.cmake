# The tuned set holds bf16 at head_dim 64 and 128. The full set adds the other files, and fp16 to every file through
# LEMO_CUDA_ALL_KERNELS, which must then be defined for all of them.
set(LEMO_ATTENTION_TUNED_SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/attention.cu
    ${CMAKE_CURRENT_LIST_DIR}/blank_rows.cu
    ${CMAKE_CURRENT_LIST_DIR}/sinks.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm80/query_lists.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm80/instantiations/forward_hd64.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm80/instantiations/forward_hd128.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm80/instantiations/backward_hd64.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm80/instantiations/backward_hd128.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm80/instantiations/forward_options_hd64.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm80/instantiations/forward_options_hd128.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm80/instantiations/forward_options_hd256.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm80/instantiations/backward_options_hd64.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm80/instantiations/backward_options_hd128.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm80/instantiations/backward_options_hd256.cu)
set(LEMO_ATTENTION_FULL_SOURCES
    ${LEMO_ATTENTION_TUNED_SOURCES}
    ${CMAKE_CURRENT_LIST_DIR}/sm80/instantiations/forward_hd80.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm80/instantiations/forward_hd96.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm80/instantiations/backward_hd80.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm80/instantiations/backward_hd96.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm80/instantiations/forward_options_hd80.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm80/instantiations/forward_options_hd96.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm80/instantiations/backward_options_hd80.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm80/instantiations/backward_options_hd96.cu)

# sm_90a only: one file per pass, options and padded head_dim (common/sm90/padded_head_dim.h).
set(LEMO_ATTENTION_SM90_TUNED_SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/sm90/backward_plan.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm90/window_edges.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm90/instantiations/forward_hd64.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm90/instantiations/forward_hd128.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm90/instantiations/backward_hd64.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm90/instantiations/backward_hd128.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm90/instantiations/forward_sinks_hd64.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm90/instantiations/forward_window_hd64.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm90/instantiations/forward_window_hd128.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm90/instantiations/backward_window_hd64.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm90/instantiations/backward_window_hd128.cu)
set(LEMO_ATTENTION_SM90_FULL_SOURCES
    ${LEMO_ATTENTION_SM90_TUNED_SOURCES}
    ${CMAKE_CURRENT_LIST_DIR}/sm90/instantiations/forward_hd96.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm90/instantiations/backward_hd96.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm90/instantiations/forward_window_hd96.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm90/instantiations/backward_window_hd96.cu)
