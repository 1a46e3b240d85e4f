// A model's forward pass as a list of instructions, recorded once from its Python definition and run for any number of
// rows (tokens). All members of the team run the whole list together; what one instruction reads was finished in a loop of
// an earlier one.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "attention/attention_plan.h"
#include "program/context.h"
#include "program/recurrence.h"
#include "codecs/matrix_storage.h"

namespace kbit {

using Weights = std::shared_ptr<MatrixStorage>;

// w * x / rms(x), or centred (LayerNorm) w * (x - mean) / deviation + b. No weight: no norm.
struct Norm {
  std::vector<float> weight, bias;  // bias: empty for none; only where centred
  float eps = 0.0f;
  bool centred = false;

  bool empty() const { return weight.empty(); }
  std::int64_t width() const { return static_cast<std::int64_t>(weight.size()); }
  // out: (padded width), as Kernels::rms_norm leaves it.
  void apply(const Kernels& kernels, const float* x, float* out) const;
};

// outs[i] = norm(x) W_i^T + b_i, and then, where asked for, an activation (W = [gate, up] or one matrix) or the addition
// to what outs[0] holds.
struct MatmulInstruction {
  int x = -1;
  std::vector<Weights> weights;
  std::vector<std::vector<float>> biases;  // empty: none
  std::vector<int> outs;
  Norm norm;
  Activation activation = Activation::none;
  bool residual = false;
  // gpt-oss's gate, where the limit is positive, and the activation silu: g sigmoid(alpha g) (u + 1) with g at most, and
  // u within the limit.
  float alpha = 1.0f, limit = 0.0f;
};
// Rows of a table: of the tokens' ids, of their positions plus `first`, or of their types.
enum class Rows { tokens, positions, types };
struct EmbedInstruction { Weights weights; int out; Rows of = Rows::tokens; int first = 0; };
struct GivenInstruction { int out; };  // what the pass brings of its rows
// Of each run of features as wide as the norm; or, with several, of each run by a norm of its own.
struct NormInstruction { int x; std::vector<Norm> norms; int out; };
// out = factor x, or, where there is a cap, cap tanh(x / cap).
struct MapInstruction { int x, out; float factor = 1.0f, cap = 0.0f; };
// Heads turned by columns [first, first + half) of the rotary tables.
struct RotateInstruction { int x, out, head_dim, first, half; };
// Heads made as wide as out's: what all share (-1: nothing), then their own, cut or filled with zeros.
struct FitInstruction { int x, shared, out, heads; };
struct AddInstruction { int x, y, out; };
// Every head's features by its own rows of one matrix (H N, K), as many for each. Onward: its features from `first` on
// (K) -> (N). Backward, by the transposed rows: `first` features stay, the rest (N) -> (K).
struct HeadsInstruction {
  int x, out, heads, first;
  bool backward;
  MatmulInstruction product;
};
struct ColumnsInstruction { int x, out, first; };  // as many columns of x, from `first` on, as out is wide
struct MultiplyInstruction { int x, y, out; };  // feature by feature
struct ActivateInstruction { int gate, up, out; Activation kind; };  // up: -1 for none
// Also half an attention: one that reads an encoder's keys and values, or those that an earlier one of the pass has
// written for the same layer (k and v are -1), or one that stores them (q and out are).
struct AttendInstruction {
  int q = -1, k = -1, v = -1, out = -1;
  int layer = 0, heads = 1, kv_heads = 1, head_dim = 1;
  float scale = 1.0f;
  int window = 0;
  bool rotary = false;
  std::vector<float> key_bias;  // (kv_heads * head_dim), in every key before it is turned; or empty
  int first_angle = 0, angles = -1;  // the columns of the rotary tables that turn heads; -1: all
  float soft_cap = 0.0f;             // of scores; 0: none
  std::vector<float> sinks = {};     // of heads: see AttentionArgs; or empty
  std::vector<float> by_distance = {};  // (heads, 2 * reach + 1), in units of log2: see AttentionArgs; or empty
  bool shares = false;               // reads what was written in this pass, too
  bool latent = false;               // the cache keeps keys alone, which are values, too (v is k)
  bool chunked = false;              // the window does not slide: see AttentionArgs
  int plan = -1;                     // among the program's plans of attentions

  bool crosses() const { return k < 0 && !shares; }
  bool stores() const { return q < 0; }
};
// x: queries and keys of key_heads, and values of heads, side by side; log_rates: of heads. Of a state space: values, keys
// and queries, decay and write are its steps, and there are skips.
struct RecurInstruction {
  int x, decay, write, out, state, key_heads, heads, key_dim, value_dim;
  std::vector<float> log_rates, skips = {};
};
struct ConvolveInstruction {
  int x, out, state, width;
  std::vector<float> weight, bias;  // (width, features); (features), or empty
};
struct GateInstruction { int x, gate, out; };  // out = sigmoid(gate) x, one gate a row, or one a feature

// Which experts a row goes to: kernels/reference_experts.py, route.
enum class Score : std::uint8_t { softmax, sigmoid, softmax_of_chosen, sparsemixer };
struct Routing {
  int experts = 1, chosen = 1;
  Score score = Score::softmax;
  bool normalise = false;
  float scale = 1.0f;
  int groups = 1, chosen_groups = 1;
  bool best_of_group = false;  // a group is as good as its best expert, not as its two best
  float jitter = 0.0f;         // of sparsemixer
  bool scales_input = false;   // what an expert weighs multiplies its rows before it, not after
};
// out = the weighted sum of what the chosen experts make of x.
struct ExpertsInstruction {
  int x = -1, logits = -1, out = -1;
  Routing routing;
  std::vector<float> selection_bias;            // of experts, or empty
  std::vector<float> scales;                    // of what experts weigh, or empty
  std::vector<MatmulInstruction> inner, down;   // of experts: gate and up with their activation; down
  MatmulInstruction all_inner, all_down;        // the matrices of all: what forms of rows they take
  int index = -1;                               // among the program's mixtures
};
using Instruction = std::variant<MatmulInstruction, EmbedInstruction, NormInstruction, AddInstruction, ActivateInstruction,
                                 AttendInstruction, RecurInstruction, ConvolveInstruction, MapInstruction,
                                 RotateInstruction, FitInstruction, MultiplyInstruction, GateInstruction, ExpertsInstruction,
                                 ColumnsInstruction, GivenInstruction, HeadsInstruction>;

// What a mixture notes of a pass: pairs of a row and an expert it goes to, sorted by expert.
struct ExpertRows {
  struct Span {
    int expert;
    std::int64_t begin, end;      // of pairs
    std::int64_t first_unit[2];   // of the pieces of both products
  };
  std::vector<std::int32_t> chosen;  // (rows, chosen)
  std::vector<float> weights;        // (rows, chosen)
  std::vector<std::int64_t> places;  // (rows, chosen): the pair's place among the sorted
  std::vector<std::int64_t> rows;    // (pairs), sorted: whose row it is
  std::vector<float> sorted_weights; // (pairs), sorted
  std::vector<std::int64_t> begins;  // of experts, while they are sorted
  std::vector<Span> spans;           // of experts that have rows
  std::int64_t units[2] = {0, 0}, longest = 0;
};

// Keys and values of the texts that cross attention reads.
struct EncoderTexts {
  const KVPages* cache = nullptr;
  const std::int32_t* tables = nullptr;  // (B, table_stride)
  std::int64_t table_stride = 0;
  const std::int32_t* lengths = nullptr;  // (B), at least 1 where a sequence has rows
};

// One pass: R rows and where they belong.
struct Pass {
  std::int64_t rows = 0;
  const std::int64_t* ids = nullptr;         // (R)
  const std::int32_t* sequence = nullptr;    // (R) row of the tables; a sequence's rows are consecutive and ascending
  const std::int32_t* position = nullptr;    // (R)
  const std::int64_t* types = nullptr;       // (R) token types; null: all 0
  const float* features = nullptr;           // (R, feature_width), what the pass brings of its rows; or null
  std::int64_t feature_width = 0;
  const std::int32_t* last_seen = nullptr;   // (R) last position a row sees, of its sequence's in this pass; null: its own
  const float* cos = nullptr;                // (P, table_half)
  const float* sin = nullptr;
  const std::int32_t* rope_row = nullptr;    // (R) row of the tables
  int table_half = 0;                        // columns of the tables, of which an attention may take some
  const KVPages* cache = nullptr;
  const std::int32_t* tables = nullptr;      // (B, table_stride) pages of each sequence, in order
  std::int64_t table_stride = 0;
  EncoderTexts encoder;
  std::vector<StateView> states;             // of the model
  const std::int32_t* state_before = nullptr;  // (B) slots; -1 where a sequence begins
  const std::int32_t* state_after = nullptr;   // (B)
  std::int64_t logits_rows = -1;             // -1: the hidden states of all rows are wanted instead
  const std::int64_t* logits_row = nullptr;  // (L)
  float* out = nullptr;                      // (L, V) or (R, hidden)
};

class Program {
 public:
  // Throws std::invalid_argument where the instruction set lacks what the compute type needs.
  Program(std::shared_ptr<Context> context, Compute compute);
  ~Program();

  // Recording.
  int buffer(std::int64_t width);
  void append(Instruction instruction);
  void finish(int hidden) { hidden_ = hidden; }
  void set_head(MatmulInstruction head);  // x and outs are ignored
  // What becomes of logits: factor times them, then capped where there is a cap.
  void set_logits(float factor, float cap) { logit_factor_ = factor, logit_cap_ = cap; }

  // Runs all instructions. Throws std::invalid_argument for an id or position that does not exist.
  void run(const Pass& pass);
  // The head alone: hidden (L, hidden width) -> out (L, V).
  void logits(const float* hidden, std::int64_t rows, float* out);

  std::int64_t buffer_width(int index) const { return buffers_.at(static_cast<std::size_t>(index)).width; }
  int buffer_count() const { return static_cast<int>(buffers_.size()); }
  std::int64_t hidden_width() const { return buffer_width(hidden_); }
  std::int64_t vocabulary() const { return head_ ? head_->weights.at(0)->matrix().rows : 0; }
  std::size_t nbytes() const;  // of buffers and scratch
  // Throws FileChanged where a file that holds weights is no longer what it was.
  void check_files() const;

 private:
  struct Buffer {
    std::int64_t width, stride;  // floats; columns beyond the width are zero, as matmuls read whole tiles
    AlignedBytes memory;
    float* data() const { return reinterpret_cast<float*>(memory.data()); }
  };
  // Rows of x as the matmuls want them: normalised, and quantized by segments of 64, 32 or 16 or rounded to bfloat16.
  struct Inputs;
  struct Scratch;  // of one member of the team

  void reserve(std::int64_t rows);
  int plan_of(const AttendInstruction& instruction);
  void note_file(const Weights& weights);
  void attend(Worker& worker, const AttendInstruction& instruction, const Pass& pass);
  void prepare_attention(const Pass& pass);
  void prepare_angles(const Pass& pass, AttentionScratch& scratch);
  void prepare_states(const Pass& pass);
  void norm(Worker& worker, const NormInstruction& instruction, std::int64_t rows);
  void map(Worker& worker, const MapInstruction& instruction, std::int64_t rows);
  void multiply(Worker& worker, const MultiplyInstruction& instruction, std::int64_t rows);
  void rotate(Worker& worker, const RotateInstruction& instruction, const Pass& pass);
  void fit_heads(Worker& worker, const FitInstruction& instruction, std::int64_t rows);
  void finish_logits(Worker& worker, std::int64_t rows, float* out);
  void recur(Worker& worker, const RecurInstruction& instruction, const Pass& pass);
  void convolve(Worker& worker, const ConvolveInstruction& instruction, const Pass& pass);
  void check(const MatmulInstruction& instruction) const;
  void check(const ExpertsInstruction& instruction) const;
  void reserve_experts(std::int64_t rows);
  void group_rows(const ExpertsInstruction& instruction, ExpertRows& noted, std::int64_t rows) const;
  void multiply_experts(Worker& worker, const std::vector<MatmulInstruction>& products, const ExpertRows& noted, int which,
                        const Inputs& inputs, bool single, float* out, std::int64_t stride);
  void mix(Worker& worker, const ExpertsInstruction& instruction, std::int64_t rows);
  void sigmoid_gate(Worker& worker, const GateInstruction& instruction, std::int64_t rows);
  void check(const HeadsInstruction& instruction) const;
  void multiply_heads(Worker& worker, const HeadsInstruction& instruction, std::int64_t rows);
  void multiply_heads_backward(Worker& worker, const HeadsInstruction& instruction, std::int64_t rows);
  void matmul(Worker& worker, const MatmulInstruction& instruction, const float* x, std::int64_t x_stride,
              const std::int64_t* row_index, std::int64_t rows, float* out, std::int64_t out_stride);
  void prepare_rows(const MatmulInstruction& instruction, Inputs& inputs, const float* x, std::int64_t x_stride,
                    const std::int64_t* row_index, std::int64_t begin, std::int64_t end) const;
  void matmul_block(const MatmulInstruction& instruction, const Inputs& inputs, Scratch& scratch, std::size_t which,
                    std::int64_t row_begin, std::int64_t row_end, std::int64_t panel_begin, std::int64_t panel_end,
                    float* out, std::int64_t out_stride) const;
  void round_row(Inputs& inputs, int slot, const float* source, std::int64_t columns, std::int64_t row) const;
  void run_kernel(const Inputs& inputs, MatmulTask& task, float* staging) const;
  void add_spikes(const MatmulInput& fine, const MatmulTask& task, const std::int64_t* rows, std::int64_t count,
                  float* staging) const;

  std::shared_ptr<Context> context_;
  Compute compute_;
  std::vector<Buffer> buffers_;
  std::vector<Instruction> instructions_;
  std::optional<MatmulInstruction> head_;
  float logit_factor_ = 1.0f, logit_cap_ = 0.0f;
  std::vector<std::shared_ptr<const MappedFile>> files_;  // that hold weights, each once
  int hidden_ = -1;
  std::int64_t capacity_ = 0;     // rows the buffers have
  std::int64_t widest_input_ = 0; // K of the widest matmul, padded
  std::unique_ptr<Inputs> shared_;
  std::vector<std::unique_ptr<Scratch>> scratch_;
  // Attentions of the same heads have one plan; those to an encoder's texts have others.
  struct AttentionHeads {
    bool crosses;
    int heads, kv_heads, head_dim;
  };
  std::vector<std::pair<AttentionHeads, std::unique_ptr<AttentionScratch>>> plans_;
  std::vector<std::unique_ptr<ExpertRows>> expert_rows_;  // of each mixture
  AlignedBytes expert_inner_, expert_outer_;              // (pairs, features), of one mixture at a time
  AlignedBytes heads_input_;                              // (heads * rows, K), of one product by heads at a time
  int mixtures_ = 0;
  std::vector<SequenceRows> sequences_;     // of the pass, for recurrent layers
  std::vector<std::int32_t> encoder_ends_;  // (R) last token of each row's encoder text
};

}  // namespace kbit
