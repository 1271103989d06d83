# As cuda/attention/sources.cmake.
set(LEMO_SCORES_TUNED_SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/scores.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm80/instantiations/scores_hd64.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm80/instantiations/scores_hd128.cu)
set(LEMO_SCORES_FULL_SOURCES
    ${LEMO_SCORES_TUNED_SOURCES}
    ${CMAKE_CURRENT_LIST_DIR}/sm80/instantiations/scores_hd80.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm80/instantiations/scores_hd96.cu)

# sm_90a only, by padded head_dim.
set(LEMO_SCORES_SM90_TUNED_SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/sm90/instantiations/scores_hd64.cu
    ${CMAKE_CURRENT_LIST_DIR}/sm90/instantiations/scores_hd128.cu)
set(LEMO_SCORES_SM90_FULL_SOURCES
    ${LEMO_SCORES_SM90_TUNED_SOURCES}
    ${CMAKE_CURRENT_LIST_DIR}/sm90/instantiations/scores_hd96.cu)
