// What a loader asks the library, by ctypes: see kernels/device_ops.py.
#pragma once

extern "C" {

// "sm_80,90a, CUDA 13.0.88", for reports.
__attribute__((visibility("default"))) const char* dendrite_built_for();

// Why kernels can't run on the current device (an old driver, no code for it), or "".
__attribute__((visibility("default"))) const char* dendrite_trouble();
}
