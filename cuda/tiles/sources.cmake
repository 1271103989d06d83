# As cuda/attention/sources.cmake.
set(LEMO_TILES_TUNED_SOURCES
    ${CMAKE_CURRENT_LIST_DIR}/tiles.cu
    ${CMAKE_CURRENT_LIST_DIR}/instantiations/tile_scores_hd64.cu
    ${CMAKE_CURRENT_LIST_DIR}/instantiations/tile_scores_hd128.cu
    ${CMAKE_CURRENT_LIST_DIR}/instantiations/tile_scores_hd256.cu)
set(LEMO_TILES_FULL_SOURCES
    ${LEMO_TILES_TUNED_SOURCES}
    ${CMAKE_CURRENT_LIST_DIR}/instantiations/tile_scores_hd80.cu
    ${CMAKE_CURRENT_LIST_DIR}/instantiations/tile_scores_hd96.cu)
