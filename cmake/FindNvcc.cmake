# Sets CMAKE_CUDA_COMPILER to nvcc, unless it or CUDACXX is set already: from PATH, from the toolkit's usual place, which is
# not always on PATH, or from wherever CMake finds one.
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  # Not cached: another project's choice stays its own.
  find_program(_nvcc nvcc HINTS /usr/local/cuda/bin NO_CACHE)
  if(_nvcc)
    set(CMAKE_CUDA_COMPILER "${_nvcc}")
  endif()
endif()
if(NOT CMAKE_CUDA_COMPILER)
  include(CheckLanguage)
  check_language(CUDA)
endif()
