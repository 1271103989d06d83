# As cuda/attention/sources.cmake.
set(LEMO_SCORES_TUNED_SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/scores.cu
    ${CMAKE_CURRENT_LIST_DIR}/scores_hd64.cu
    ${CMAKE_CURRENT_LIST_DIR}/scores_hd128.cu)
set(LEMO_SCORES_FULL_SOURCES
    ${LEMO_SCORES_TUNED_SOURCES}
    ${CMAKE_CURRENT_LIST_DIR}/scores_hd80.cu
    ${CMAKE_CURRENT_LIST_DIR}/scores_hd96.cu)

# sm_90a only; hopper_hd96.cu is empty in the tuned set.
set(LEMO_SCORES_HOPPER_SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/hopper_hd64.cu
    ${CMAKE_CURRENT_LIST_DIR}/hopper_hd96.cu
    ${CMAKE_CURRENT_LIST_DIR}/hopper_hd128.cu)
