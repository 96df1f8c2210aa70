# Where the headers of llama.cpp's common library lie: sets CHAT_SOURCE, or CHAT_MISSING to why there are none.
#
# A wheel of llama-cpp-python has the library but not its headers. They are taken from the source
# distribution of the same release, once: what is kept of it, in the user's cache, is a megabyte of 77.
function(find_chat_headers RELEASE)
  set(KEPT "$ENV{XDG_CACHE_HOME}")
  if(NOT KEPT AND NOT "$ENV{HOME}" STREQUAL "")
    set(KEPT "$ENV{HOME}/.cache")
  endif()
  if(NOT KEPT)
    set(KEPT "${CMAKE_BINARY_DIR}")
  endif()
  set(SOURCE "${KEPT}/moe-gguf/llama-cpp-python-${RELEASE}")
  if(NOT EXISTS "${SOURCE}/common/chat.h")
    download_chat_headers(${RELEASE} "${SOURCE}")
  endif()
  if(EXISTS "${SOURCE}/common/chat.h")
    set(CHAT_SOURCE "${SOURCE}" PARENT_SCOPE)
  else()
    set(CHAT_MISSING "${CHAT_MISSING}" PARENT_SCOPE)
  endif()
endfunction()

# pip knows the user's index, proxy, certificates and whether it may use a network at all. It asks a source
# distribution for its metadata, for which this build's own backend does; nothing is compiled.
function(download_chat_headers RELEASE SOURCE)
  set(WORK "${CMAKE_BINARY_DIR}/llama-cpp-python")
  file(REMOVE_RECURSE "${WORK}")
  execute_process(
    COMMAND ${Python_EXECUTABLE} -m pip download --quiet --disable-pip-version-check --retries 1 --no-deps
            --no-binary llama-cpp-python --no-build-isolation --dest "${WORK}" llama-cpp-python==${RELEASE}
    TIMEOUT 900 RESULT_VARIABLE FAILED OUTPUT_QUIET ERROR_VARIABLE SAID)
  file(GLOB ARCHIVE "${WORK}/*.tar.gz")
  if(NOT FAILED EQUAL 0 OR NOT ARCHIVE)
    string(REGEX MATCH "[^\n]*(ERROR|No module)[^\n]*" REASON "${SAID}")
    set(CHAT_MISSING "pip download llama-cpp-python==${RELEASE}: ${REASON}" PARENT_SCOPE)
    return()
  endif()
  file(ARCHIVE_EXTRACT INPUT "${ARCHIVE}" DESTINATION "${WORK}" PATTERNS
       "*/vendor/llama.cpp/common/*.h" "*/vendor/llama.cpp/models/templates/*" "*/vendor/llama.cpp/LICENSE")
  file(GLOB FOUND "${WORK}/*/vendor/llama.cpp")
  # Whole or not at all: another build may look meanwhile.
  get_filename_component(PARENT "${SOURCE}" DIRECTORY)
  string(RANDOM LENGTH 8 NAME)
  file(MAKE_DIRECTORY "${PARENT}")
  file(COPY "${FOUND}/common" "${FOUND}/models" "${FOUND}/LICENSE" DESTINATION "${PARENT}/${NAME}")
  file(RENAME "${PARENT}/${NAME}" "${SOURCE}" RESULT RENAMED)
  if(NOT RENAMED EQUAL 0)
    file(REMOVE_RECURSE "${PARENT}/${NAME}")
  endif()
  file(REMOVE_RECURSE "${WORK}")
endfunction()
