# TORCH_ROOT: the torch package of the Python that is built for, found without importing it.
# TORCH_MISSING: why there is none to build against, or empty.
set(TORCH_MISSING "")
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
    "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
  OUTPUT_VARIABLE TORCH_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE FAILED)
set(TORCH_VERSION_FILE ${TORCH_ROOT}/include/torch/headeronly/version.h)
if(FAILED)
  set(TORCH_MISSING "${Python_EXECUTABLE} has no torch")
elseif(NOT EXISTS ${TORCH_VERSION_FILE})
  set(TORCH_MISSING "the torch in ${TORCH_ROOT} has no headers of its stable ABI (torch >= 2.10 has)")
else()
  file(STRINGS ${TORCH_VERSION_FILE} LINES REGEX "define TORCH_VERSION_(MAJOR|MINOR) ")
  string(REGEX MATCHALL "[0-9]+" TORCH_NUMBERS "${LINES}")
  list(JOIN TORCH_NUMBERS "." TORCH_FOUND)
  if(TORCH_FOUND VERSION_LESS 2.10)
    set(TORCH_MISSING "torch is ${TORCH_FOUND}, its stable ABI is needed as 2.10 has it")
  endif()
endif()
