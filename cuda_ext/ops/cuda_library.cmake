# libdendrite_cuda.so and, beside it, what ptxas said of every kernel (registers, spills).
set(NVCC_FLAGS -O3 -std=c++20 -DNDEBUG -ccbin ${CMAKE_CXX_COMPILER} ${NVCC_GENCODE}
  -Xcompiler=-fPIC,-fvisibility=hidden,-Wall -Xptxas=-v -Xfatbin=-compress-all
  -I${CMAKE_CURRENT_SOURCE_DIR} -I${CMAKE_CURRENT_SOURCE_DIR}/../include)
set(DENDRITE_NVCC_EXTRA "" CACHE STRING "More flags for nvcc, such as -lineinfo")
list(APPEND NVCC_FLAGS ${DENDRITE_NVCC_EXTRA})

set(OBJECTS "")
set(LOGS "")
foreach(source ${DEVICE_SOURCES})
  get_filename_component(stem ${source} NAME_WE)
  set(object ${CMAKE_CURRENT_BINARY_DIR}/${stem}.o)
  set(log ${CMAKE_CURRENT_BINARY_DIR}/${stem}.ptxas.txt)
  if(CMAKE_VERSION VERSION_LESS 3.20)
    set(depends ${DEVICE_HEADERS})
    set(write_depends "")
  else()
    set(depends DEPFILE ${object}.d)  # (MAIN_DEPENDENCY would keep the source from the emulator)
    set(write_depends -MD -MF ${object}.d)
  endif()
  add_custom_command(OUTPUT ${object} ${log}
    COMMAND ${CMAKE_COMMAND} -DLOG=${log} -P ${CMAKE_CURRENT_SOURCE_DIR}/run_nvcc.cmake --
      ${NVCC} ${NVCC_FLAGS} ${write_depends} -c ${source} -o ${object}
    DEPENDS ${source} ${CMAKE_CURRENT_SOURCE_DIR}/run_nvcc.cmake ${depends} VERBATIM
    COMMENT "nvcc ${stem}.cu")
  list(APPEND OBJECTS ${object})
  list(APPEND LOGS ${log})
endforeach()

add_library(dendrite_cuda MODULE ${BINDINGS} ${OBJECTS})
dendrite_device_library(dendrite_cuda)
target_compile_definitions(dendrite_cuda PRIVATE USE_CUDA
  DENDRITE_BUILT_FOR="sm_${NVCC_ARCHS}, CUDA ${CUDAToolkit_VERSION}")
target_link_libraries(dendrite_cuda PRIVATE CUDA::cudart_static)
target_link_options(dendrite_cuda PRIVATE -s)

get_target_property(folder dendrite_cuda LIBRARY_OUTPUT_DIRECTORY)
set(REPORT ${folder}/libdendrite_cuda.ptxas.txt)
add_custom_command(OUTPUT ${REPORT}
  COMMAND ${CMAKE_COMMAND} -DREPORT=${REPORT} -P ${CMAKE_CURRENT_SOURCE_DIR}/join_logs.cmake -- ${LOGS}
  DEPENDS ${LOGS} VERBATIM)
add_custom_target(dendrite_cuda_report DEPENDS ${REPORT})
add_dependencies(dendrite_cuda dendrite_cuda_report)
install(FILES ${REPORT} DESTINATION dendrite_engine)
