// Python bindings. Float tensors come as integer addresses whose shapes the Python side has checked;
// integer arrays come as buffers, whose type and length are checked here. Long calls release the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "rows.h"
#include "sampling.h"
#include "schedule.h"
#include "team.h"

namespace nb = nanobind;

namespace dendrite {
namespace {

using Address = uintptr_t;

// Query-key multiply-adds (about half a millisecond) above which other Python threads get a turn. Below,
// waiting to get the GIL back from a busy thread would cost more than the kernel itself.
constexpr int64_t kReleaseWork = int64_t(1) << 23;

float* floats(Address address) { return reinterpret_cast<float*>(address); }

// Read-only view of a C-contiguous array of T for the length of a call.
template <class T>
class View {
 public:
  View(nb::handle object, const char* name, const char* formats) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_FORMAT | PyBUF_C_CONTIGUOUS) != 0) {
      PyErr_Clear();
      throw std::invalid_argument(std::string(name) + " must be a C-contiguous array");
    }
    const char* format = view_.format == nullptr ? "B" : view_.format;
    bool known = false;
    for (const char* f = formats; *f != 0; ++f) known |= format[0] == *f && format[1] == 0;
    if (!known || view_.itemsize != sizeof(T)) {
      const std::string text = std::string(name) + " has format '" + format + "', not " +
                               std::to_string(8 * sizeof(T)) + "-bit '" + formats + "'";
      PyBuffer_Release(&view_);
      throw std::invalid_argument(text);
    }
  }
  ~View() { PyBuffer_Release(&view_); }
  View(const View&) = delete;
  View& operator=(const View&) = delete;

  const T* data() const { return static_cast<const T*>(view_.buf); }
  int64_t size() const { return view_.len / int64_t(sizeof(T)); }
  const T* need(int64_t count, const char* name) const {
    if (size() < count)
      throw std::invalid_argument(std::string(name) + " has " + std::to_string(size()) +
                                  " entries, " + std::to_string(count) + " are needed");
    return data();
  }

 private:
  Py_buffer view_;
};

struct Ints : View<int32_t> {
  Ints(nb::handle object, const char* name) : View(object, name, "il") {}
};
struct Floats : View<float> {
  Floats(nb::handle object, const char* name) : View(object, name, "f") {}
};
struct Doubles : View<double> {
  Doubles(nb::handle object, const char* name) : View(object, name, "d") {}
};

Schedule* make_schedule(nb::handle positions, nb::handle node_pos, nb::handle node_len,
                        nb::handle row_begin, nb::handle row_end, nb::handle page_indptr,
                        nb::handle page_indices, int page_size, int window, int group) {
  const Ints pos(positions, "positions"), start(node_pos, "node_pos"), len(node_len, "node_len");
  const Ints begin(row_begin, "node_row_begin"), end(row_end, "node_row_end");
  const Ints indptr(page_indptr, "node_page_indptr"), pages(page_indices, "page_indices");
  PlanArrays plan{};
  plan.num_rows = pos.size();
  plan.num_nodes = start.size();
  plan.num_page_indices = pages.size();
  plan.positions = pos.data();
  plan.node_pos = start.data();
  plan.node_len = len.need(plan.num_nodes, "node_len");
  plan.node_row_begin = begin.need(plan.num_nodes, "node_row_begin");
  plan.node_row_end = end.need(plan.num_nodes, "node_row_end");
  plan.node_page_indptr = indptr.need(plan.num_nodes + 1, "node_page_indptr");
  plan.page_indices = pages.data();
  return new Schedule(plan, page_size, window, group);
}

void attend(Context& context, const Schedule& schedule, Address q, Address k, Address v, Address out,
            int heads, int kv_heads, int dim, int64_t num_pages, float scale) {
  const AttentionCall call{floats(q), floats(k), floats(v),   floats(out), heads,
                           kv_heads,  dim,       num_pages,   scale};
  if (schedule.work * heads * dim < kReleaseWork) return tree_attention(context, schedule, call);
  const nb::gil_scoped_release release;
  tree_attention(context, schedule, call);
}

// PackedPages.address: what dendrite_engine/kernels/packed.py has checked. Those of the first pages
// follow behind the side's own.
constexpr size_t kSideNumbers = 14;

PackedSide packed_side(const nb::tuple& numbers, size_t begin) {
  const auto at = [&](size_t i) { return nb::cast<int64_t>(numbers[begin + i]); };
  PackedSide side{};
  side.data = reinterpret_cast<uint8_t*>(at(0));
  side.pages = at(1);
  side.page_stride = at(2);
  side.head_stride = at(3);
  side.codes = at(4);
  side.scales = at(5);
  side.codec = int32_t(at(6));
  side.page_size = int32_t(at(8));
  side.kv_heads = int32_t(at(9));
  side.dim = int32_t(at(10));
  side.signs = reinterpret_cast<const float*>(at(11));
  side.mean = reinterpret_cast<const float*>(at(12));
  side.first_index = reinterpret_cast<const int32_t*>(at(13));
  if (side.codec < 0 || side.codec >= kPackedCodecs)
    throw std::invalid_argument("codec " + std::to_string(side.codec) + " has no kernel");
  if (side.dim % kGroup != 0 || side.dim > kMaxPackedDim || side.page_size % kGroup != 0)
    throw std::invalid_argument("packed pages need head_dim and page_size in multiples of 16");
  return side;
}

struct PackedPages {
  PackedSide side{}, first{};

  explicit PackedPages(const nb::tuple& numbers) {
    if (numbers.size() != kSideNumbers && numbers.size() != 2 * kSideNumbers)
      throw std::invalid_argument("packed pages must be described by 14 or 28 numbers");
    side = packed_side(numbers, 0);
    if (numbers.size() == kSideNumbers) return;
    first = packed_side(numbers, kSideNumbers);
    side.first = &first;
  }
  PackedPages(const PackedPages&) = delete;
  PackedPages& operator=(const PackedPages&) = delete;
};

void attend_packed(Context& context, const Schedule& schedule, Address q, const nb::tuple& keys,
                   const nb::tuple& values, Address out, int heads, float scale) {
  const PackedPages k_pages(keys), v_pages(values);
  const PackedSide& k = k_pages.side;
  AttentionCall call{floats(q), nullptr, nullptr, floats(out), heads,
                     k.kv_heads, k.dim,  k.pages, scale,       &k,    &v_pages.side};
  if (schedule.work * heads * k.dim < kReleaseWork) return tree_attention(context, schedule, call);
  const nb::gil_scoped_release release;
  tree_attention(context, schedule, call);
}

void norm(Context& context, Address x, Address residual, Address weight, float eps, Address out,
          int64_t rows, int width) {
  add_rms_norm(context, floats(x), floats(residual), floats(weight), eps, floats(out), rows, width);
}

void silu(Context& context, Address gate_up, Address out, int64_t rows, int width) {
  silu_mul(context, floats(gate_up), floats(out), rows, width);
}

// What both forms of rope_store_kv have in common; page_size and pages are set by the caller.
struct RopeRows {
  Ints positions, slots;
  RopeJob job{};

  RopeRows(Address qkv, nb::handle pos, Address cos, Address sin, nb::handle slot, Address q_out,
           Address q_norm, Address k_norm, float eps, int64_t rows, int heads, int kv_heads, int dim)
      : positions(pos, "positions"), slots(slot, "slots") {
    if (dim < 2 || dim % 2 != 0 || dim > 1024)
      throw std::invalid_argument("head_dim must be even and at most 1024, got " +
                                  std::to_string(dim));
    job.qkv = floats(qkv);
    job.positions = positions.need(rows, "positions");
    job.slots = slots.need(rows, "slots");
    job.cos = floats(cos);
    job.sin = floats(sin);
    job.q_out = floats(q_out);
    job.q_norm = floats(q_norm);
    job.k_norm = floats(k_norm);
    job.eps = eps;
    job.heads = heads;
    job.kv_heads = kv_heads;
    job.dim = dim;
  }
};

void rope(Context& context, Address qkv, nb::handle positions, Address cos, Address sin,
          nb::handle slots, Address k_pages, Address v_pages, Address q_out, Address q_norm,
          Address k_norm, float eps, int64_t rows, int heads, int kv_heads, int dim, int page_size,
          int64_t num_pages, int64_t max_position) {
  RopeRows call(qkv, positions, cos, sin, slots, q_out, q_norm, k_norm, eps, rows, heads, kv_heads, dim);
  call.job.k_pages = floats(k_pages);
  call.job.v_pages = floats(v_pages);
  call.job.page_size = page_size;
  rope_store_kv(context, call.job, rows, max_position, num_pages * page_size);
}

void rope_packed(Context& context, Address qkv, nb::handle positions, Address cos, Address sin,
                 nb::handle slots, const nb::tuple& keys, const nb::tuple& values, Address q_out,
                 Address q_norm, Address k_norm, float eps, int64_t rows, int heads,
                 int64_t max_position) {
  const PackedPages k_pages(keys), v_pages(values);
  const PackedSide& k = k_pages.side;
  RopeRows call(qkv, positions, cos, sin, slots, q_out, q_norm, k_norm, eps, rows, heads, k.kv_heads,
                k.dim);
  call.job.page_size = k.page_size;
  call.job.k_side = &k;
  call.job.v_side = &v_pages.side;
  rope_store_kv(context, call.job, rows, max_position, k.pages * k.page_size);
}

void copy_whole(Context& context, Address data, int64_t pages, int64_t page_bytes, nb::handle copies) {
  const Ints rows(copies, "copies");
  const nb::gil_scoped_release release;
  copy_packed(context, reinterpret_cast<uint8_t*>(data), pages, page_bytes, rows.data(),
              rows.size() / 3);
}

void copy(Context& context, Address k_all, Address v_all, nb::handle copies, int64_t layers,
          int64_t pages, int kv_heads, int dim, int page_size) {
  const Ints rows(copies, "copies");
  CopyJob job{floats(k_all), floats(v_all), rows.data(), rows.size() / 3, layers, pages,
              kv_heads,      dim,           page_size};
  const nb::gil_scoped_release release;
  copy_pages(context, job);
}

// batch: the SamplingBatch arrays in the order of SamplingArrays; mask may be None.
void draw(Context& context, Address logits, int64_t rows, int vocab, int64_t stride, nb::tuple batch,
          Address tokens, Address logprobs) {
  if (batch.size() != 15) throw std::invalid_argument("batch must hold 15 arrays");
  const Floats temperature(batch[0], "temperature"), top_p(batch[2], "top_p");
  const Floats min_p(batch[3], "min_p"), repetition(batch[5], "repetition");
  const Floats presence(batch[6], "presence"), frequency(batch[7], "frequency");
  const Ints top_k(batch[1], "top_k"), pen_indptr(batch[8], "pen_indptr"), pen_ids(batch[9], "pen_ids");
  const Ints pen_counts(batch[10], "pen_counts"), bias_indptr(batch[11], "bias_indptr");
  const Ints bias_ids(batch[12], "bias_ids");
  const Floats bias_values(batch[13], "bias_values");
  const Doubles uniform(batch[4], "uniform");
  SamplingArrays a{};
  a.temperature = temperature.need(rows, "temperature");
  a.top_k = top_k.need(rows, "top_k");
  a.top_p = top_p.need(rows, "top_p");
  a.min_p = min_p.need(rows, "min_p");
  a.uniform = uniform.need(rows, "uniform");
  a.repetition = repetition.need(rows, "repetition");
  a.presence = presence.need(rows, "presence");
  a.frequency = frequency.need(rows, "frequency");
  a.pen_indptr = pen_indptr.need(rows + 1, "pen_indptr");
  a.pen_ids = pen_ids.need(a.pen_indptr[rows], "pen_ids");
  a.pen_counts = pen_counts.need(a.pen_indptr[rows], "pen_counts");
  a.bias_indptr = bias_indptr.need(rows + 1, "bias_indptr");
  a.bias_ids = bias_ids.need(a.bias_indptr[rows], "bias_ids");
  a.bias_values = bias_values.need(a.bias_indptr[rows], "bias_values");
  const auto run = [&] {
    const nb::gil_scoped_release release;
    sample(context, floats(logits), rows, vocab, stride, a, reinterpret_cast<int32_t*>(tokens),
           floats(logprobs));
  };
  if (batch[14].is_none()) return run();
  const Ints mask(batch[14], "mask");
  a.mask = mask.need(rows * ((vocab + 31) / 32), "mask");
  run();
}

void top(Context& context, Address logits, int64_t rows, int vocab, int64_t stride, int k,
         Address ids, Address logprobs) {
  const nb::gil_scoped_release release;
  top_logprobs(context, floats(logits), rows, vocab, stride, k, reinterpret_cast<int32_t*>(ids),
               floats(logprobs));
}

}  // namespace
}  // namespace dendrite

NB_MODULE(_cpu, module) {
  // An engine that is still open when the interpreter ends is no leak worth a page of warnings.
  nb::set_leak_warnings(false);
  using namespace dendrite;
  module.doc() = "SIMD kernels over fp32 tensors in host memory; dendrite_engine.kernels.native drives them.";
  module.def("available_isas", &available_isas);
  module.def("team_description", &team_description);
  nb::class_<Schedule>(module, "Schedule")
      .def(nb::new_(&make_schedule), nb::arg("positions"), nb::arg("node_pos"), nb::arg("node_len"),
           nb::arg("node_row_begin"), nb::arg("node_row_end"), nb::arg("node_page_indptr"),
           nb::arg("page_indices"), nb::arg("page_size"), nb::arg("window"), nb::arg("group"))
      .def_prop_ro("num_rows", &Schedule::num_rows);
  nb::class_<Context>(module, "Context")
      .def(nb::init<const std::string&, int>(), nb::arg("isa") = "auto", nb::arg("threads") = 1)
      .def_prop_ro("isa", [](const Context& c) { return std::string(c.kernels->name); })
      .def_prop_rw(
          "threads", [](const Context& c) { return c.threads; },
          [](Context& c, int threads) {
            const std::lock_guard<std::mutex> guard(c.lock);
            c.set_threads(threads);
          })
      .def("tree_attention", &attend)
      .def("tree_attention_packed", &attend_packed)
      .def("add_rms_norm", &norm)
      .def("rope_store_kv", &rope)
      .def("rope_store_packed", &rope_packed)
      .def("silu_mul", &silu)
      .def("copy_pages", &copy)
      .def("copy_packed", &copy_whole)
      .def("sample", &draw)
      .def("top_logprobs", &top);
}
