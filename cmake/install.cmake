# Installation: find_package(lemo CONFIG) with the target lemo::lemo, and lemo.pc for pkg-config. Both find the library and
# its headers from where they lie themselves, so that the folder can be moved: a wheel carries it into any environment.
include(CMakePackageConfigHelpers)
set(_package ${CMAKE_INSTALL_LIBDIR}/cmake/lemo)

target_include_directories(lemo PUBLIC $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
install(TARGETS lemo EXPORT lemo-targets DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(DIRECTORY cpp/include/lemo DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
        FILES_MATCHING PATTERN "*.h" PATTERN "*.hpp")

install(EXPORT lemo-targets NAMESPACE lemo:: DESTINATION ${_package})
configure_package_config_file(cmake/lemo-config.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/lemo-config.cmake
                              INSTALL_DESTINATION ${_package})
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/lemo-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/lemo-config.cmake ${CMAKE_CURRENT_BINARY_DIR}/lemo-config-version.cmake
        DESTINATION ${_package})

# What a program in C has to add to a static library: the C++ runtime, under the compiler's names for it.
set(_libs_private)
if(LEMO_STATIC)
  set(_libs_private ${CMAKE_CXX_IMPLICIT_LINK_LIBRARIES})
  list(FILTER _libs_private INCLUDE REGEX "^(stdc\\+\\+|c\\+\\+|c\\+\\+abi|m)$")
  list(REMOVE_DUPLICATES _libs_private)
  target_link_libraries(lemo INTERFACE $<INSTALL_INTERFACE:${_libs_private}>)
endif()

# --- pkg-config -------------------------------------------------------------------------------------------------------
cmake_path(RELATIVE_PATH CMAKE_INSTALL_PREFIX BASE_DIRECTORY ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig OUTPUT_VARIABLE _up)
cmake_path(APPEND _includedir "\${prefix}" "${CMAKE_INSTALL_INCLUDEDIR}")  # an absolute folder replaces the prefix
cmake_path(APPEND _libdir "\${prefix}" "${CMAKE_INSTALL_LIBDIR}")
set(_cflags)
set(_cudalibdir)
if(LEMO_STATIC)
  set(_cflags " -DLEMO_STATIC")
  list(TRANSFORM _libs_private PREPEND "-l")
  if(LEMO_WITH_CUDA)
    set(_cudalibdir "cudalibdir=${CUDAToolkit_LIBRARY_DIR}\n")
    list(PREPEND _libs_private "-L\${cudalibdir}" -lcudart_static -ldl -lrt)
  endif()
  list(APPEND _libs_private ${CMAKE_THREAD_LIBS_INIT})
  list(JOIN _libs_private " " _libs_private)
endif()
configure_file(cmake/lemo.pc.in ${CMAKE_CURRENT_BINARY_DIR}/lemo.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/lemo.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
