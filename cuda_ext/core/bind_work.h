#pragma once

#include <nanobind/nanobind.h>

namespace dendrite {

void bind_attention_work(nanobind::module_& m);

}  // namespace dendrite
