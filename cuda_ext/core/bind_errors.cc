#include "bind_errors.h"

#include <nanobind/nanobind.h>

#include "errors.h"

namespace dendrite {

namespace {

namespace nb = nanobind;

// Imported when something is raised: the module itself loads without the package.
nb::object error_class(const char* name) {
  return nb::module_::import_("dendrite_engine.errors").attr(name);
}

void raise(const char* name, const char* message) {
  PyErr_SetString(error_class(name).ptr(), message);
}

void raise_out_of_pages(const OutOfPagesError& error) {
  nb::object cls = error_class("OutOfPages");
  nb::object value = cls(error.need, error.free, error.cached, error.live, error.budget);
  PyErr_SetObject(cls.ptr(), value.ptr());
}

void translate(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const OutOfPagesError& error) {
    raise_out_of_pages(error);
  } catch (const EmptyPromptError& error) {
    raise("EmptyPrompt", error.what());
  } catch (const InvalidArgumentError& error) {
    raise("InvalidArgument", error.what());
  } catch (const StaleBranchError& error) {
    raise("StaleBranch", error.what());
  } catch (const IntegrityFault& error) {
    raise("IntegrityError", error.what());
  }
}

}  // namespace

void register_errors() { nb::register_exception_translator(translate); }

}  // namespace dendrite
