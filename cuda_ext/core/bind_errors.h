// Raises the classes of dendrite_engine.errors for the errors of the control plane.
#pragma once

namespace dendrite {

void register_errors();

}  // namespace dendrite
