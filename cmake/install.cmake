# What `make install` puts where: libraries, headers, the CMake package, the pkg-config file, the tool with its
# manual pages and completions.
include(CMakePackageConfigHelpers)

install(TARGETS qcowkit EXPORT qcowkit LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(TARGETS qcowkit_static ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(TARGETS qcow RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(DIRECTORY ${PROJECT_BINARY_DIR}/share/ DESTINATION ${CMAKE_INSTALL_DATADIR})
install(DIRECTORY include/qcow DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT qcowkit NAMESPACE qcowkit:: DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/qcowkit)

configure_package_config_file(cmake/qcowkitConfig.cmake.in ${PROJECT_BINARY_DIR}/qcowkitConfig.cmake INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/qcowkit)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/qcowkitConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/qcowkitConfig.cmake ${PROJECT_BINARY_DIR}/qcowkitConfigVersion.cmake DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/qcowkit)

# Relative to where the file lies, so that `cmake --install --prefix` may choose any place.
file(RELATIVE_PATH QCOW_PREFIX_FROM_PC /prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig /prefix)
configure_file(cmake/qcowkit.pc.in ${PROJECT_BINARY_DIR}/qcowkit.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/qcowkit.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
