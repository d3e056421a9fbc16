# Libraries that only some features need.

# Where WANTED is true and pkg-config finds MODULES, sets QCOW_<NAME>, the target, and QCOW_<NAME>_LIBS, for a linker. Else
# says what is missing.
macro(qcow_optional name wanted modules libs without)
  if(${wanted})
    pkg_check_modules(${name} IMPORTED_TARGET ${modules})
  endif()
  if(${name}_FOUND AND ${wanted})
    set(QCOW_${name} PkgConfig::${name})
    set(QCOW_${name}_LIBS "${libs}")
  else()
    message(STATUS "Without ${without}")
  endif()
endmacro()

# For a library that is loaded when it is needed: sets QCOW_<NAME>_LIBRARY to the name that programs which link to it have.
macro(qcow_loaded name library)
  find_library(${name}_LIBRARY ${library} REQUIRED)
  file(REAL_PATH ${${name}_LIBRARY} ${name}_file)
  string(REGEX MATCH "lib${library}[.]so[.][0-9]+" QCOW_${name}_LIBRARY ${${name}_file})
endmacro()

# Leaves out the sources that match WITHOUT if there is QCOW_<NAME>, else those that match WITH.
macro(qcow_either name with without)
  if(QCOW_${name})
    set(excluded "${without}")
  else()
    set(excluded "${with}")
  endif()
  list(FILTER QCOW_SOURCES EXCLUDE REGEX "${excluded}")
endmacro()
