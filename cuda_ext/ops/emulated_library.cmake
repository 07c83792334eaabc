# libdendrite_emulated.so: the launchers, kernels and bindings as plain C++; see cuda_ext/emulator.
file(GLOB EMULATOR_SOURCES CONFIGURE_DEPENDS ../emulator/*.cc)
add_library(dendrite_emulated MODULE ${BINDINGS} ${DEVICE_SOURCES} ${EMULATOR_SOURCES})
set_source_files_properties(${DEVICE_SOURCES} PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-x;c++")
dendrite_device_library(dendrite_emulated)
target_compile_options(dendrite_emulated PRIVATE -Wno-unknown-pragmas)  # nvcc's unroll
target_compile_definitions(dendrite_emulated PRIVATE DENDRITE_EMULATE
  DENDRITE_BUILT_FOR="emulated on the CPU")
