# Sets LEMO_CUTLASS_DIR (cache): the folder that holds cutlass/cutlass.h. Looked for in LEMO_CUTLASS_DIR, then in the
# pip package nvidia-cutlass of the Python at hand.
if(NOT LEMO_CUTLASS_DIR)
  find_package(Python 3.9 QUIET COMPONENTS Interpreter)
  if(Python_Interpreter_FOUND)
    execute_process(
      COMMAND
        "${Python_EXECUTABLE}" -c
        "import importlib.util as u; s = u.find_spec('cutlass_library'); print(s.submodule_search_locations[0] if s else '')"
      OUTPUT_VARIABLE _package
      OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    if(_package AND EXISTS "${_package}/source/include/cutlass/cutlass.h")
      set(LEMO_CUTLASS_DIR "${_package}/source/include" CACHE PATH "folder with cutlass/cutlass.h" FORCE)
    endif()
  endif()
elseif(NOT EXISTS "${LEMO_CUTLASS_DIR}/cutlass/cutlass.h")
  message(FATAL_ERROR "LEMO_CUTLASS_DIR: expected a folder that holds cutlass/cutlass.h, got ${LEMO_CUTLASS_DIR}")
endif()
