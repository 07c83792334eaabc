#include "library.h"

const char* dendrite_built_for() {
  return DENDRITE_BUILT_FOR;
}
