// Python bindings of Program: the instructions that a forward pass is recorded with. Arrays are numpy's (or anything
// with DLPack on the CPU); nothing is converted or copied on the way in, and everything that a kernel relies on is checked.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "bind/arrays.h"
#include "bind/bind.h"
#include "program/program.h"

namespace nb = nanobind;

namespace kbit {
namespace {

Compute compute_kind(const std::string& name) {
  if (name == "int8") return Compute::int8;
  if (name == "bf16") return Compute::bf16;
  require(name == "fp32", "compute is int8, bf16 or fp32");
  return Compute::fp32;
}

Activation activation_kind(const std::optional<std::string>& name) {
  if (!name) return Activation::none;
  if (*name == "silu") return Activation::silu;
  if (*name == "gelu") return Activation::gelu;
  if (*name == "gelu_tanh") return Activation::gelu_tanh;
  if (*name == "elu") return Activation::elu;
  require(*name == "relu", "an activation is silu, gelu, gelu_tanh, relu or elu");
  return Activation::relu;
}

std::vector<float> copied(const std::optional<Vector>& vector) {
  if (!vector) return {};
  return std::vector<float>(vector->data(), vector->data() + vector->shape(0));
}

// A norm as Python hands it over: its weight (none: no norm), LayerNorm's bias, and whether it is one.
Norm norm_of(const std::optional<Vector>& weight, float eps, const std::optional<Vector>& bias, bool centred) {
  Norm norm{copied(weight), copied(bias), eps, centred};
  require(norm.bias.empty() || (centred && norm.bias.size() == norm.weight.size()),
          "only a centred norm has a bias, as wide as its weight");
  return norm;
}

// The sizes of an attention, and the buffers that it has.
void require_heads(const Program& p, const AttendInstruction& a) {
  const auto wide = [&](int buffer, int heads) { return p.buffer_width(buffer) == std::int64_t{heads} * a.head_dim; };
  require(a.heads >= 1 && a.kv_heads >= 1 && a.head_dim >= 1 && a.heads % a.kv_heads == 0 && a.layer >= 0,
          "the heads do not fit their buffers");
  require((a.stores() || (wide(a.q, a.heads) && wide(a.out, a.heads) && a.out != a.q)) &&
              (a.k < 0 || (wide(a.k, a.kv_heads) && wide(a.v, a.kv_heads))),
          "the heads do not fit their buffers");
}

// Lists take None, which is no matrix.
void require_all(const std::vector<Weights>& matrices) {
  for (const Weights& matrix : matrices) require(matrix != nullptr, "None is no matrix");
}

void add_matmul(Program& program, int x, const std::vector<Weights>& weights,
                const std::vector<std::optional<Vector>>& biases, const std::vector<int>& outs,
                const std::optional<Vector>& norm, float eps, const std::optional<std::string>& activation,
                std::optional<int> residual, const std::optional<Vector>& norm_bias, bool centred) {
  require_all(weights);
  MatmulInstruction m;
  m.x = x;
  m.weights = weights;
  for (const auto& bias : biases) m.biases.push_back(copied(bias));
  m.outs = outs;
  m.norm = norm_of(norm, eps, norm_bias, centred);
  m.activation = activation_kind(activation);
  m.residual = residual.has_value();
  if (residual) require(outs.size() == 1 && outs[0] == *residual && *residual != x, "a residual sum is made in place");
  for (int out : outs) require(out != x, "a matmul cannot write over its input");
  program.append(std::move(m));
}

// A size of a recurrence, the products of which are numbers that fit.
bool small(int size) { return size >= 1 && size <= 1 << 20; }

Score score_kind(const std::string& name) {
  if (name == "softmax") return Score::softmax;
  if (name == "sigmoid") return Score::sigmoid;
  if (name == "sparsemixer") return Score::sparsemixer;
  require(name == "softmax_of_chosen", "a score is softmax, sigmoid, softmax_of_chosen or sparsemixer");
  return Score::softmax_of_chosen;
}

void add_experts(Program& program, int x, int logits, int out, const std::vector<Weights>& gates,
                 const std::vector<Weights>& ups, const std::vector<Weights>& downs,
                 const std::vector<std::optional<Vector>>& gate_biases, const std::vector<std::optional<Vector>>& up_biases,
                 const std::vector<std::optional<Vector>>& down_biases, const std::optional<Vector>& selection_bias,
                 int chosen, const std::string& score, bool normalise, float scale, int groups, int chosen_groups,
                 const std::string& activation, float alpha, float limit, bool best_of_group,
                 const std::optional<Vector>& scales, float jitter, bool scales_input) {
  const std::size_t count = gates.size();
  require(count >= 1 && ups.size() == count && downs.size() == count && gate_biases.size() == count &&
              up_biases.size() == count && down_biases.size() == count,
          "every expert has a gate, an up and a down, and a bias or none of each");
  for (const auto* matrices : {&gates, &ups, &downs}) require_all(*matrices);
  require(limit == 0.0f || (limit > 0.0f && alpha > 0.0f && activation == "silu"), "a clamped gate is silu's");
  ExpertsInstruction m;
  m.x = x;
  m.logits = logits;
  m.out = out;
  m.routing = {static_cast<int>(count), chosen, score_kind(score), normalise, scale, groups, chosen_groups, best_of_group,
               jitter, scales_input};
  m.selection_bias = copied(selection_bias);
  m.scales = copied(scales);
  for (std::size_t e = 0; e < count; ++e) {
    MatmulInstruction inner, down;
    inner.weights = {gates[e], ups[e]};
    inner.biases = {copied(gate_biases[e]), copied(up_biases[e])};
    inner.activation = activation_kind(activation);
    inner.alpha = alpha;
    inner.limit = limit;
    down.weights = {downs[e]};
    down.biases = {copied(down_biases[e])};
    m.all_inner.weights.insert(m.all_inner.weights.end(), {gates[e], ups[e]});
    m.all_down.weights.push_back(downs[e]);
    m.inner.push_back(std::move(inner));
    m.down.push_back(std::move(down));
  }
  program.append(std::move(m));
}

}  // namespace

void bind_program(nb::module_& module) {
  nb::class_<Program> program(module, "Program", "A forward pass, recorded once and run for any number of rows.");
  program
      .def("__init__",
           [](Program* self, std::shared_ptr<Context> context, const std::string& compute) {
             new (self) Program(std::move(context), compute_kind(compute));
           },
           nb::arg("context"), nb::arg("compute"))
      .def("buffer", &Program::buffer, nb::arg("width"))
      .def("embed",
           [](Program& p, Weights matrix, int out, const std::string& of, int first) {
             require(p.buffer_width(out) == matrix->matrix().columns, "the embedding does not fit its buffer");
             require((of == "tokens" || of == "positions" || of == "types") && first >= 0, "no such rows of an embedding");
             const Rows rows = of == "tokens" ? Rows::tokens : of == "positions" ? Rows::positions : Rows::types;
             p.append(EmbedInstruction{std::move(matrix), out, rows, first});
           },
           nb::arg("matrix"), nb::arg("out"), nb::arg("of") = "tokens", nb::arg("first") = 0)
      .def("given",
           [](Program& p, int out) {
             p.buffer_width(out);
             p.append(GivenInstruction{out});
           },
           nb::arg("out"))
      .def("matmul", &add_matmul, nb::arg("x"), nb::arg("matrices"), nb::arg("biases"), nb::arg("outs"),
           nb::arg("norm").none(), nb::arg("eps"), nb::arg("activation").none(), nb::arg("residual").none(),
           nb::arg("norm_bias") = nb::none(), nb::arg("centred") = false)
      .def("norm",
           [](Program& p, int x, const Vector& weight, float eps, int out, const std::optional<Vector>& bias,
              bool centred, int groups) {
             require(groups >= 1 && weight.shape(0) % static_cast<std::size_t>(groups) == 0 &&
                         (groups == 1 || (!centred && static_cast<std::int64_t>(weight.shape(0)) == p.buffer_width(x))),
                     "the groups of a norm do not fit its buffer");
             const auto width = static_cast<std::int64_t>(weight.shape(0)) / groups;
             const bool runs = width > 0 && width < p.buffer_width(x);
             require(p.buffer_width(x) == p.buffer_width(out) && width > 0 && p.buffer_width(x) % width == 0 &&
                         (!runs || (out != x && (width + 64) * 4 <= kMatmulScratch)),
                     "the norm does not fit its buffers");
             const Norm whole = norm_of(weight, eps, bias, centred);
             std::vector<Norm> norms(static_cast<std::size_t>(groups), whole);
             for (int g = 0; groups > 1 && g < groups; ++g) {
               const auto first = whole.weight.begin() + g * width;
               norms[static_cast<std::size_t>(g)].weight.assign(first, first + width);
             }
             p.append(NormInstruction{x, std::move(norms), out});
           },
           nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("out"), nb::arg("bias") = nb::none(),
           nb::arg("centred") = false, nb::arg("groups") = 1)
      .def("add",
           [](Program& p, int x, int y, int out) {
             require(p.buffer_width(x) == p.buffer_width(out) && p.buffer_width(y) == p.buffer_width(out) && out != y,
                     "the terms of a sum do not fit its buffer");
             p.append(AddInstruction{x, y, out});
           },
           nb::arg("x"), nb::arg("y"), nb::arg("out"))
      .def("multiply",
           [](Program& p, int x, int y, int out) {
             require(p.buffer_width(x) == p.buffer_width(out) && p.buffer_width(y) == p.buffer_width(out),
                     "the factors of a product do not fit its buffer");
             p.append(MultiplyInstruction{x, y, out});
           },
           nb::arg("x"), nb::arg("y"), nb::arg("out"))
      .def("map",
           [](Program& p, int x, int out, float factor, float cap) {
             require(p.buffer_width(x) == p.buffer_width(out) && cap >= 0.0f, "the buffers of a factor or a cap differ");
             p.append(MapInstruction{x, out, factor, cap});
           },
           nb::arg("x"), nb::arg("out"), nb::arg("factor") = 1.0f, nb::arg("cap") = 0.0f)
      .def("columns",
           [](Program& p, int x, int out, int first) {
             require(first >= 0 && out != x && first + p.buffer_width(out) <= p.buffer_width(x),
                     "the columns are not all there, or would be written over");
             p.append(ColumnsInstruction{x, out, first});
           },
           nb::arg("x"), nb::arg("out"), nb::arg("first"))
      .def("rotate",
           [](Program& p, int x, int out, int head_dim, int first, int half) {
             require(head_dim >= 1 && p.buffer_width(x) == p.buffer_width(out) && p.buffer_width(x) % head_dim == 0 &&
                         out != x && first >= 0 && half >= 0 && 2 * half <= head_dim,
                     "the heads of a rotation do not fit their buffers");
             p.append(RotateInstruction{x, out, head_dim, first, half});
           },
           nb::arg("x"), nb::arg("out"), nb::arg("head_dim"), nb::arg("first"), nb::arg("half"))
      .def("fit_heads",
           [](Program& p, int x, std::optional<int> shared, int out, int heads) {
             const auto before = shared ? p.buffer_width(*shared) : 0;
             require(heads >= 1 && p.buffer_width(x) % heads == 0 && p.buffer_width(out) % heads == 0 && out != x &&
                         shared != out && before <= p.buffer_width(out) / heads,
                     "the heads do not fit their buffers");
             p.append(FitInstruction{x, shared.value_or(-1), out, heads});
           },
           nb::arg("x"), nb::arg("shared").none(), nb::arg("out"), nb::arg("heads"))
      .def("activate",
           [](Program& p, int gate, std::optional<int> up, const std::string& kind, int out) {
             require(p.buffer_width(gate) == p.buffer_width(out) && (!up || p.buffer_width(*up) == p.buffer_width(out)),
                     "the activation's buffers differ");
             p.append(ActivateInstruction{gate, up.value_or(-1), out, activation_kind(kind)});
           },
           nb::arg("gate"), nb::arg("up").none(), nb::arg("kind"), nb::arg("out"))
      .def("by_heads",
           [](Program& p, int x, Weights matrix, int out, int heads, int first, bool backward) {
             HeadsInstruction h{x, out, heads, first, backward, {}};
             h.product.weights = {std::move(matrix)};
             h.product.biases = {{}};
             p.append(std::move(h));
           },
           nb::arg("x"), nb::arg("matrix"), nb::arg("out"), nb::arg("heads"), nb::arg("first"), nb::arg("backward"))
      .def("sigmoid_gate",
           [](Program& p, int x, int gate, int out) {
             require(p.buffer_width(x) == p.buffer_width(out) && 
                         (p.buffer_width(gate) == 1 || p.buffer_width(gate) == p.buffer_width(x)) && gate != out,
                     "the buffers of a gate differ");
             p.append(GateInstruction{x, gate, out});
           },
           nb::arg("x"), nb::arg("gate"), nb::arg("out"))
      .def("experts", &add_experts, nb::arg("x"), nb::arg("logits"), nb::arg("out"), nb::arg("gates"), nb::arg("ups"),
           nb::arg("downs"), nb::arg("gate_biases"), nb::arg("up_biases"), nb::arg("down_biases"),
           nb::arg("selection_bias").none(), nb::arg("chosen"), nb::arg("score"), nb::arg("normalise"), nb::arg("scale"),
           nb::arg("groups"), nb::arg("chosen_groups"), nb::arg("activation"), nb::arg("alpha") = 1.0f,
           nb::arg("limit") = 0.0f, nb::arg("best_of_group") = false, nb::arg("scales") = nb::none(), nb::arg("jitter") = 0.0f,
           nb::arg("scales_input") = false)
      .def("attend",
           [](Program& p, int q, std::optional<int> k, std::optional<int> v, int out, int layer, int heads, int kv_heads, int head_dim, float scale,
              std::optional<int> window, bool rotary, const std::optional<Vector>& key_bias,
              const std::optional<std::tuple<int, int>>& angles, float soft_cap, const std::optional<Vector>& sinks,
              const std::optional<Vector>& by_distance, bool latent, bool chunked) {
             require(k.has_value() == v.has_value() && (k || !key_bias) && (!latent || k == v), "keys come with values");
             AttendInstruction a{q, k.value_or(-1), v.value_or(-1), out, layer, heads, kv_heads, head_dim, scale,
                                 window.value_or(0), rotary, copied(key_bias)};
             a.shares = !k;
             a.latent = latent;
             a.chunked = chunked;
             require(!chunked || window, "chunks are as long as the window");
             if (angles) {
               a.first_angle = std::get<0>(*angles);
               require(a.first_angle >= 0 && std::get<1>(*angles) >= a.first_angle,
                       "columns of the rotary tables are a range");
               a.angles = std::get<1>(*angles) - a.first_angle;
             }
             a.soft_cap = soft_cap;
             a.sinks = copied(sinks);
             require(!sinks || sinks->shape(0) == static_cast<std::size_t>(heads), "every head has a sink");
             require_heads(p, a);
             if (by_distance) {
               a.by_distance = copied(by_distance);
               require(!a.by_distance.empty() && a.by_distance.size() % static_cast<std::size_t>(heads) == 0 &&
                           a.by_distance.size() / static_cast<std::size_t>(heads) % 2 == 1,
                       "what is added by distance is (heads, 2 * reach + 1)");
               for (float& added : a.by_distance) added *= 1.44269504088896341f;
             }
             require(soft_cap >= 0.0f, "a soft cap is positive, or 0 for none");
             require(out != a.k && out != a.v && (!window || *window > 0) &&
                         (!key_bias || static_cast<std::int64_t>(key_bias->shape(0)) == p.buffer_width(a.k)),
                     "the heads do not fit their buffers");
             p.append(std::move(a));
           },
           nb::arg("q"), nb::arg("k").none(), nb::arg("v").none(), nb::arg("out"), nb::arg("layer"), nb::arg("heads"),
           nb::arg("kv_heads"), nb::arg("head_dim"), nb::arg("scale"), nb::arg("window").none(),
           nb::arg("rotary") = true, nb::arg("key_bias") = nb::none(), nb::arg("angles") = nb::none(),
           nb::arg("soft_cap") = 0.0f, nb::arg("sinks") = nb::none(), nb::arg("by_distance") = nb::none(),
           nb::arg("latent") = false, nb::arg("chunked") = false)
      .def("store_keys",
           [](Program& p, int k, int v, int layer, int heads, int kv_heads, int head_dim) {
             AttendInstruction a{-1, k, v, -1, layer, heads, kv_heads, head_dim, 1.0f, 0, false, {}};
             require_heads(p, a);
             p.append(std::move(a));
           },
           nb::arg("k"), nb::arg("v"), nb::arg("layer"), nb::arg("heads"), nb::arg("kv_heads"), nb::arg("head_dim"))
      .def("cross_attend",
           [](Program& p, int q, int out, int layer, int heads, int kv_heads, int head_dim, float scale) {
             AttendInstruction a{q, -1, -1, out, layer, heads, kv_heads, head_dim, scale, 0, false, {}};
             require_heads(p, a);
             p.append(std::move(a));
           },
           nb::arg("q"), nb::arg("out"), nb::arg("layer"), nb::arg("heads"), nb::arg("kv_heads"), nb::arg("head_dim"),
           nb::arg("scale"))
      .def("recur",
           [](Program& p, int x, int decay, int write, const Vector& log_rates, int out, int state, int key_heads, int heads,
              int key_dim, int value_dim) {
             require(small(key_heads) && small(heads) && heads % key_heads == 0 && small(key_dim) && small(value_dim) && state >= 0 &&
                         p.buffer_width(x) == 2 * std::int64_t{key_heads} * key_dim + std::int64_t{heads} * value_dim &&
                         p.buffer_width(out) == std::int64_t{heads} * value_dim && p.buffer_width(decay) == heads &&
                         p.buffer_width(write) == heads && out != x && out != decay && out != write &&
                         log_rates.shape(0) == static_cast<std::size_t>(heads) &&
                         recurrence_scratch(key_dim) * 4 <= kMatmulScratch,
                     "the heads of a recurrence do not fit their buffers");
             p.append(RecurInstruction{x, decay, write, out, state, key_heads, heads, key_dim, value_dim, copied(log_rates)});
           },
           nb::arg("x"), nb::arg("decay"), nb::arg("write"), nb::arg("log_rates"), nb::arg("out"), nb::arg("state"),
           nb::arg("key_heads"), nb::arg("heads"), nb::arg("key_dim"), nb::arg("value_dim"))
      .def("scan",
           [](Program& p, int x, int steps, const Vector& log_rates, const Vector& skips, int out, int state, int groups,
              int heads, int key_dim, int value_dim) {
             require(small(groups) && small(heads) && heads % groups == 0 && small(key_dim) && small(value_dim) && state >= 0 &&
                         p.buffer_width(x) == 2 * std::int64_t{groups} * key_dim + std::int64_t{heads} * value_dim &&
                         p.buffer_width(out) == std::int64_t{heads} * value_dim && p.buffer_width(steps) == heads &&
                         out != x && out != steps && log_rates.shape(0) == static_cast<std::size_t>(heads) &&
                         skips.shape(0) == static_cast<std::size_t>(heads) &&
                         recurrence_scratch(key_dim) * 4 <= kMatmulScratch,
                     "the heads of a state space do not fit their buffers");
             p.append(RecurInstruction{x, steps, steps, out, state, groups, heads, key_dim, value_dim, copied(log_rates),
                                       copied(skips)});
           },
           nb::arg("x"), nb::arg("steps"), nb::arg("log_rates"), nb::arg("skips"), nb::arg("out"), nb::arg("state"),
           nb::arg("groups"), nb::arg("heads"), nb::arg("key_dim"), nb::arg("value_dim"))
      .def("convolve",
           [](Program& p, int x, const Vector& weight, int out, int state, int width, const std::optional<Vector>& bias) {
             require(width >= 2 && state >= 0 && p.buffer_width(x) == p.buffer_width(out) && out != x &&
                         static_cast<std::int64_t>(weight.shape(0)) == width * p.buffer_width(x) &&
                         (!bias || static_cast<std::int64_t>(bias->shape(0)) == p.buffer_width(x)),
                     "a convolution does not fit its buffers");
             p.append(ConvolveInstruction{x, out, state, width, copied(weight), copied(bias)});
           },
           nb::arg("x"), nb::arg("weight"), nb::arg("out"), nb::arg("state"), nb::arg("width"),
           nb::arg("bias") = nb::none())
      .def("finish",
           [](Program& p, int hidden) {
             p.buffer_width(hidden);
             p.finish(hidden);
           },
           nb::arg("hidden"))
      .def("head",
           [](Program& p, Weights matrix, const std::optional<Vector>& norm, float eps, const std::optional<Vector>& norm_bias,
              bool centred, float factor, float cap, const std::optional<Vector>& bias) {
             MatmulInstruction head;
             require(!bias || static_cast<std::int64_t>(bias->shape(0)) == matrix->matrix().rows,
                     "the bias of a head is of another vocabulary");
             head.weights = {std::move(matrix)};
             head.biases = {copied(bias)};
             head.norm = norm_of(norm, eps, norm_bias, centred);
             require(cap >= 0.0f, "a soft cap is positive, or 0 for none");
             p.set_head(std::move(head));
             p.set_logits(factor, cap);
           },
           nb::arg("matrix"), nb::arg("norm").none(), nb::arg("eps"), nb::arg("norm_bias") = nb::none(),
           nb::arg("centred") = false, nb::arg("factor") = 1.0f, nb::arg("cap") = 0.0f, nb::arg("bias") = nb::none())
      .def_prop_ro("nbytes", &Program::nbytes);
  bind_pass(program);
}

}  // namespace kbit
