// Python module dendrite_engine._core.
//
// GIL: short calls keep it and may wait for the mutex while they hold it; that can't deadlock,
// because whoever holds the mutex never waits for the GIL. Long calls release the GIL first, and
// the mutex inside them is given back before the GIL is taken again.
#include <nanobind/nanobind.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <numeric>
#include <optional>

#include "arrays.h"
#include "bind_errors.h"
#include "bind_work.h"
#include "docs.h"
#include "errors.h"
#include "tree_core.h"

namespace dendrite {

namespace {

using nb::literals::operator""_a;

constexpr size_t kManyTokens = 2048;  // below this, releasing the GIL costs more than the call

struct PyCore {
  std::shared_ptr<TreeCore> core;

  PyCore(int64_t num_pages, int64_t page_size, bool prefix_cache, bool debug)
      : core(std::make_shared<TreeCore>(num_pages, page_size, prefix_cache, debug)) {}
};

// Keeps the core alive, so that a plan dropped after its core still closes cleanly.
struct PyPlan {
  std::shared_ptr<TreeCore> core;
  int64_t id;
  PlanArrays arrays;

  PyPlan(std::shared_ptr<TreeCore> core) : core(std::move(core)), id(0) {}
  PyPlan(const PyPlan&) = delete;
  ~PyPlan() { core->cancel(id); }
};

template <class Call>
auto call_maybe_without_gil(bool release, Call&& call) {
  std::optional<nb::gil_scoped_release> guard;
  if (release) guard.emplace();
  return call();
}

template <class Call>
auto call_without_gil(Call&& call) {
  return call_maybe_without_gil(true, std::forward<Call>(call));
}

void check_same_size(const char* a, size_t size_a, const char* b, size_t size_b) {
  if (size_a == size_b) return;
  throw InvalidArgumentError(std::string(a) + " has " + std::to_string(size_a) + " entries, " + b +
                             " has " + std::to_string(size_b) + "; they must be equal");
}

// One entry a token, or none at all.
template <class T>
std::optional<ArrayArg<T>> optional_array(nb::handle value, const char* name, size_t num_tokens) {
  std::optional<ArrayArg<T>> values;
  if (value.is_none()) return values;
  values.emplace(value, name);
  check_same_size(name, values->size(), "tokens", num_tokens);
  return values;
}

nb::tuple create(PyCore& self, nb::handle tokens, const std::string& name) {
  ArrayArg<int32_t> ids(tokens, "tokens");
  auto made = call_maybe_without_gil(ids.size() > kManyTokens, [&] {
    return self.core->create(ids.data(), ids.size(), name);
  });
  return nb::make_tuple(made.first, made.second);
}

void append(PyCore& self, int64_t branch, nb::handle tokens, nb::handle logprobs, bool retain) {
  ArrayArg<int32_t> ids(tokens, "tokens");
  auto values = optional_array<float>(logprobs, "logprobs", ids.size());
  call_maybe_without_gil(ids.size() > kManyTokens, [&] {
    self.core->append(branch, ids.data(), ids.size(), values ? values->data() : nullptr, retain);
  });
}

NumpyArray<uint8_t> append_batch(PyCore& self, nb::handle branches, nb::handle tokens,
                                 nb::handle logprobs, nb::handle expected) {
  ArrayArg<int64_t> handles(branches, "branches");
  ArrayArg<int32_t> ids(tokens, "tokens");
  check_same_size("branches", handles.size(), "tokens", ids.size());
  auto values = optional_array<float>(logprobs, "logprobs", ids.size());
  auto lengths = optional_array<int32_t>(expected, "expected", ids.size());
  return to_numpy(self.core->append_batch(
      handles.data(), ids.data(), values ? values->data() : nullptr,
      lengths ? lengths->data() : nullptr, ids.size()));
}

int64_t draft(PyCore& self, int64_t branch, nb::handle tokens) {
  ArrayArg<int32_t> ids(tokens, "tokens");
  return self.core->draft(branch, ids.data(), ids.size());
}

int adopt(PyCore& self, int64_t branch, int64_t draft, int64_t keep, nb::handle logprobs,
          int64_t expected) {
  ArrayArg<float> values(logprobs, "logprobs");
  return self.core->adopt(branch, draft, keep, values.data(), values.size(), expected);
}

nb::object plan(PyCore& self, nb::handle branches, nb::handle quotas) {
  ArrayArg<int64_t> handles(branches, "branches");
  ArrayArg<int32_t> limits(quotas, "quotas");
  check_same_size("branches", handles.size(), "quotas", limits.size());
  auto made = std::make_unique<PyPlan>(self.core);
  // A decoding step keeps the GIL: a thread that computes would give it back only after its turn.
  const int64_t most_rows = std::accumulate(limits.data(), limits.data() + limits.size(), int64_t{0});
  call_maybe_without_gil(most_rows > static_cast<int64_t>(kManyTokens), [&] {
    made->id = self.core->plan(handles.data(), limits.data(), limits.size(), made->arrays);
  });
  // nanobind deletes the plan together with its Python object.
  return nb::cast(made.release(), nb::rv_policy::take_ownership);
}

nb::tuple page_tables(PyCore& self, nb::handle branches) {
  ArrayArg<int64_t> handles(branches, "branches");
  PageTables tables =
      call_without_gil([&] { return self.core->page_tables(handles.data(), handles.size()); });
  return nb::make_tuple(to_numpy(std::move(tables.indptr)), to_numpy(std::move(tables.indices)),
                        to_numpy(std::move(tables.last_page_len)));
}

nb::dict describe(PyCore& self, nb::handle branches) {
  ArrayArg<int64_t> handles(branches, "branches");
  BranchColumns columns =
      call_without_gil([&] { return self.core->describe(handles.data(), handles.size()); });
  nb::dict out;
  out["num_tokens"] = to_numpy(std::move(columns.num_tokens));
  out["num_computed"] = to_numpy(std::move(columns.num_computed));
  out["pages"] = to_numpy(std::move(columns.pages));
  out["owned_pages"] = to_numpy(std::move(columns.owned_pages));
  out["tail_refs"] = to_numpy(std::move(columns.tail_refs));
  out["segments"] = to_numpy(std::move(columns.segments));
  return out;
}

nb::list segments(PyCore& self, int64_t branch) {
  nb::list out;
  for (const SegmentInfo& s : self.core->segments(branch)) {
    out.append(nb::make_tuple(s.id, s.start, s.length, s.refs, s.pages));
  }
  return out;
}

nb::dict stats(PyCore& self) {
  nb::dict out;
  for (auto& [name, value] : call_without_gil([&] { return self.core->stats(); })) {
    out[name] = value;
  }
  return out;
}

nb::object logprob_list(const std::vector<float>& values) {
  nb::list out;
  for (float value : values) {
    if (value != value) {
      out.append(nb::none());
    } else {
      out.append(static_cast<double>(value));
    }
  }
  return out;
}

nb::dict dump(PyCore& self) {
  const Dump state = call_without_gil([&] { return self.core->dump(); });
  nb::list segments, branches, index;
  for (const SegmentDump& s : state.segments) {
    nb::dict row;
    row["id"] = s.id;
    row["parent"] = s.parent;
    row["start"] = s.start;
    row["computed"] = s.computed;
    row["refs"] = s.refs;
    row["pending_src"] = s.pending_src;
    row["namespace"] = s.name;
    row["tokens"] = s.tokens;
    row["logprobs"] = logprob_list(s.logprobs);
    row["pages"] = s.pages;
    segments.append(row);
  }
  for (const auto& [handle, tail] : state.branches) branches.append(nb::make_tuple(handle, tail));
  for (const IndexDump& n : state.index) {
    nb::dict row;
    row["page"] = n.page;
    row["parent"] = n.parent;
    row["namespace"] = n.name;
    row["tokens"] = n.tokens;
    row["owner"] = n.owner;
    index.append(row);
  }
  nb::dict out;
  out["segments"] = segments;
  out["branches"] = branches;
  out["free_handles"] = state.free_handles;
  out["page_refs"] = state.page_refs;
  out["page_state"] = std::vector<int>(state.page_state.begin(), state.page_state.end());
  out["free_list"] = state.free_list;
  out["retained"] = state.retained;
  out["lru"] = state.lru;
  out["index"] = index;
  out["flights"] = state.flights;
  out["stats"] = stats(self);
  return out;
}

nb::tuple debug_events(PyCore& self) {
  PageEvents events = self.core->debug_events();
  return nb::make_tuple(events.taken, events.freed, events.sealed);
}

void bind_writing(nb::class_<PyCore>& cls) {
  cls.def("create", &create, "tokens"_a.none(), "namespace"_a = "", docs::kCreate)
      .def("fork", [](PyCore& s, int64_t b) { return s.core->fork(b); }, "branch"_a, docs::kFork)
      .def("fork_many", [](PyCore& s, int64_t b, int64_t n) { return s.core->fork_many(b, n); },
           "branch"_a, "n"_a, docs::kForkMany)
      .def("fork_at", [](PyCore& s, int64_t b, int64_t p) { return s.core->fork_at(b, p); },
           "branch"_a, "position"_a, docs::kForkAt)
      .def("append", &append, "branch"_a, "tokens"_a.none(), "logprobs"_a = nb::none(),
           "retain"_a = false, docs::kAppend)
      .def("append_batch", &append_batch, "branches"_a.none(), "tokens"_a.none(),
           "logprobs"_a = nb::none(), "expected"_a = nb::none(), docs::kAppendBatch)
      .def("set_logprobs",
           [](PyCore& s, int64_t b, int64_t start, nb::handle logprobs) {
             ArrayArg<float> values(logprobs, "logprobs");
             s.core->set_logprobs(b, start, values.data(), values.size());
           },
           "branch"_a, "start"_a, "logprobs"_a.none(), docs::kSetLogprobs)
      .def("rollback", [](PyCore& s, int64_t b, int64_t n) { return s.core->rollback(b, n); },
           "branch"_a, "n"_a, docs::kRollback)
      .def("prune", [](PyCore& s, int64_t b) { return s.core->prune(b); }, "branch"_a,
           docs::kPrune)
      .def("draft", &draft, "branch"_a, "tokens"_a.none(), docs::kDraft)
      .def("adopt", &adopt, "branch"_a, "draft"_a, "keep"_a, "logprobs"_a.none(), "expected"_a,
           docs::kAdopt)
      .def("evict", [](PyCore& s, int64_t n) { return s.core->evict(n); }, "n"_a, docs::kEvict)
      .def("plan", &plan, "branches"_a.none(), "quotas"_a.none(), docs::kPlan)
      .def("debug_events", &debug_events, docs::kDebugEvents)
      .def("debug_unsealed", [](PyCore& s) { return s.core->debug_unsealed(); },
           docs::kDebugUnsealed);
}

void bind_reading(nb::class_<PyCore>& cls) {
  cls.def_prop_ro("num_pages", [](PyCore& s) { return s.core->num_pages(); }, "Pages in the pool.")
      .def_prop_ro("page_size", [](PyCore& s) { return s.core->page_size(); }, "Tokens in a page.")
      .def("num_tokens", [](PyCore& s, int64_t b) { return s.core->num_tokens(b); }, "branch"_a,
           docs::kNumTokens)
      .def("peek_free",
           [](PyCore& s, int64_t n) { return to_numpy(s.core->peek_free(n)); }, "n"_a,
           docs::kPeekFree)
      .def("num_computed", [](PyCore& s, int64_t b) { return s.core->num_computed(b); },
           "branch"_a, docs::kNumComputed)
      .def("tokens",
           [](PyCore& s, int64_t b, int64_t start) { return to_numpy(s.core->tokens(b, start)); },
           "branch"_a, "start"_a = 0, docs::kTokens)
      .def("logprobs",
           [](PyCore& s, int64_t b, int64_t start) { return to_numpy(s.core->logprobs(b, start)); },
           "branch"_a, "start"_a = 0, docs::kLogprobs)
      .def("pending",
           [](PyCore& s, nb::handle branches) {
             ArrayArg<int64_t> handles(branches, "branches");
             return to_numpy(s.core->pending(handles.data(), handles.size()));
           },
           "branches"_a.none(), docs::kPending)
      .def("page_tables", &page_tables, "branches"_a.none(), docs::kPageTables)
      .def("describe", &describe, "branches"_a.none(), docs::kDescribe)
      .def("segments", &segments, "branch"_a, docs::kSegments)
      .def("page_refs", [](PyCore& s) { return to_numpy(s.core->page_refs()); }, docs::kPageRefs)
      .def("page_state", [](PyCore& s) { return to_numpy(s.core->page_state()); },
           docs::kPageState)
      .def("match_prefix",
           [](PyCore& s, nb::handle tokens, const std::string& name) {
             ArrayArg<int32_t> ids(tokens, "tokens");
             return s.core->match_prefix(ids.data(), ids.size(), name);
           },
           "tokens"_a.none(), "namespace"_a = "", docs::kMatchPrefix)
      .def("stats", &stats, docs::kStats)
      .def("refcount_histogram",
           [](PyCore& s) { return call_without_gil([&] { return s.core->refcount_histogram(); }); },
           docs::kHistogram)
      .def("check_integrity",
           [](PyCore& s) { call_without_gil([&] { s.core->check_integrity(); }); },
           docs::kCheckIntegrity)
      .def("dump", &dump, docs::kDump);
}

using PlanVector = std::vector<int32_t> PlanArrays::*;

// The view keeps the plan alive and costs no copy.
template <PlanVector kField>
NumpyArray<int32_t> view(nb::handle_t<PyPlan> self) {
  auto& values = nb::inst_ptr<PyPlan>(self)->arrays.*kField;
  if (values.empty()) values.reserve(1);
  return NumpyArray<int32_t>(values.data(), {values.size()}, self);
}

nb::ndarray<nb::numpy, int32_t, nb::ndim<2>> view_copies(nb::handle_t<PyPlan> self) {
  auto& values = nb::inst_ptr<PyPlan>(self)->arrays.copies;
  if (values.empty()) values.reserve(1);
  return nb::ndarray<nb::numpy, int32_t, nb::ndim<2>>(values.data(), {values.size() / 3, 3}, self);
}

void bind_plan(nb::module_& m) {
  nb::class_<PyPlan>(m, "Plan", docs::kPlanClass)
      .def_prop_ro("token_ids", &view<&PlanArrays::token_ids>, "int32[T] token of each row.")
      .def_prop_ro("positions", &view<&PlanArrays::positions>, "int32[T] position of each row.")
      .def_prop_ro("slots", &view<&PlanArrays::slots>,
                   "int32[T] page * page_size + offset; -1 = K and V are not stored.")
      .def_prop_ro("copies", &view_copies,
                   "int32[C, 3] (source page, target page, slots), to run before K/V is stored.")
      .def_prop_ro("logits_row", &view<&PlanArrays::logits_row>,
                   "int32[n] row of each branch's next-token logits, -1 = not finished yet.")
      .def_prop_ro("item_indptr", &view<&PlanArrays::item_indptr>,
                   "int32[items + 1] rows of each item (one segment's run of tokens).")
      .def_prop_ro("node_pos", &view<&PlanArrays::node_pos>,
                   "int32[N] position of an attention node's first slot.")
      .def_prop_ro("node_len", &view<&PlanArrays::node_len>, "int32[N] tokens of the node.")
      .def_prop_ro("node_row_begin", &view<&PlanArrays::node_row_begin>,
                   "int32[N] first row that reads the node.")
      .def_prop_ro("node_row_end", &view<&PlanArrays::node_row_end>,
                   "int32[N] row after the last one that reads the node.")
      .def_prop_ro("node_page_indptr", &view<&PlanArrays::node_page_indptr>,
                   "int32[N + 1] the node's part of page_indices.")
      .def_prop_ro("page_indices", &view<&PlanArrays::page_indices>, "int32[] page ids.")
      .def_prop_ro("num_tokens", [](PyPlan& p) { return p.arrays.positions.size(); }, "Rows (T).")
      .def_prop_ro("num_items", [](PyPlan& p) { return p.arrays.item_indptr.size() - 1; },
                   "Items.")
      .def_prop_ro("num_nodes", [](PyPlan& p) { return p.arrays.node_pos.size(); },
                   "Attention nodes (N).")
      .def("commit",
           [](PyPlan& p) {
             const bool release = p.arrays.positions.size() > kManyTokens;
             call_maybe_without_gil(release, [&] { p.core->commit(p.id); });
           },
           docs::kCommit)
      .def("cancel", [](PyPlan& p) { p.core->cancel(p.id); }, docs::kCancel);
}

}  // namespace

NB_MODULE(_core, m) {
  // An engine that is still open when the interpreter ends is no leak worth a page of warnings.
  nb::set_leak_warnings(false);
  m.doc() = docs::kModule;
  register_errors();
  nb::class_<PyCore> cls(m, "TreeCore", docs::kTreeCore);
  cls.def(nb::init<int64_t, int64_t, bool, bool>(), "num_pages"_a, "page_size"_a = 16,
          "prefix_cache"_a = true, "debug"_a = false);
  bind_writing(cls);
  bind_reading(cls);
  bind_plan(m);
  bind_attention_work(m);
}

}  // namespace dendrite
