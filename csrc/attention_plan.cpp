#include "attention_plan.hpp"

#include <limits>

#include "check.hpp"

namespace fastguide {
namespace {

constexpr std::int64_t kQueries = 72;        // of one task, where a KV head has no more heads
constexpr std::int64_t kPieceBlocks = 16;    // fewer blocks are not worth a piece
constexpr std::int64_t kMinShare = 1 << 20;  // multiplications that are worth a thread
constexpr std::int64_t kTasksPerThread = 4;  // so that no thread waits long for the last

void check(const TreeAttention& args) {
  if (args.kv_heads < 1 || args.heads < 1 || args.heads % args.kv_heads != 0) {
    refuse("query must have a multiple of the ", args.kv_heads, " heads of keys, not ", args.heads);
  }
  const TreeLayout& layout = args.layout;
  const std::int32_t* starts = layout.row_starts;
  if (starts[0] != 0) refuse("layout.row_starts must begin with 0, not ", starts[0]);
  for (std::int64_t r = 0; r < layout.requests; ++r) {
    if (starts[r + 1] >= starts[r] && starts[r + 1] <= args.rows) continue;
    refuse("layout.row_starts must ascend to at most ", args.rows, ", not go from ", starts[r],
           " to ", starts[r + 1], " (request ", r, ")");
  }
  if (starts[layout.requests] != args.rows) {
    refuse("layout.row_starts must end with ", args.rows, ", the rows of query, not ",
           starts[layout.requests]);
  }
  for (std::int64_t r = 0; r < layout.requests; ++r) {
    const std::int64_t first = layout.slot_starts[r], slots = layout.slot_counts[r];
    if (first < 0 || slots < 0 || first + slots > layout.slot_count) {
      refuse("layout.slot_starts and slot_counts must stay within ", layout.slot_count,
             " slots, not go from ", first, " to ", first + slots, " (request ", r, ")");
    }
    for (std::int64_t i = first; i < first + slots; ++i) {
      if (layout.slots[i] >= 0 && layout.slots[i] < args.pool) continue;
      refuse("layout.slots must be 0 to ", args.pool - 1, ", not ", layout.slots[i], " (index ", i,
             ")");
    }
    const std::int64_t rows = layout.row_starts[r + 1] - layout.row_starts[r];
    if (rows > slots) {
      refuse("layout must have a slot for each row, not ", slots, " slots for ", rows,
             " rows (request ", r, ")");
    }
    for (std::int64_t i = 0; i < rows; ++i) {
      const std::int64_t n = layout.row_starts[r] + i, own = slots - rows + i;
      if (0 <= layout.trunk[n] && layout.trunk[n] <= layout.branch[n] && layout.branch[n] <= own) {
        continue;
      }
      refuse("layout must have 0 <= trunk <= branch <= ", own, ", the row's own slot, not ",
             layout.trunk[n], " and ", layout.branch[n], " (row ", n, ")");
    }
  }
}

Sight sight_of(const TreeAttention& args, std::int64_t row, std::int64_t own) {
  const std::int64_t trunk = args.layout.trunk[row], branch = args.layout.branch[row];
  if (!args.window) return {0, trunk, branch, own + 1};
  // Positions rise by one along what a row sees, so its branch follows on its trunk.
  const std::int64_t first = trunk + own - branch - args.window + 1;
  return {std::clamp<std::int64_t>(first, 0, trunk), trunk, std::max(branch, own - args.window + 1),
          own + 1};
}

// Of rows whose sights are known.
RowBlock row_block(const std::vector<Sight>& sights, std::int64_t request, std::int64_t first,
                   std::int64_t count, std::int64_t scratch) {
  std::int64_t begin = std::numeric_limits<std::int64_t>::max(), end = 0;
  for (std::int64_t n = first; n < first + count; ++n) {
    const Sight& sight = sights[n];
    const bool sees_trunk = sight.trunk_begin < sight.trunk_end;
    begin = std::min(begin, sees_trunk ? sight.trunk_begin : sight.branch_begin);
    end = std::max(end, sight.branch_end);
  }
  begin /= kBlock;
  end = (end + kBlock - 1) / kBlock;
  const auto pieces = std::clamp<std::int64_t>((end - begin) / kPieceBlocks, 1, kMaxPieces);
  return {request, first, count, begin, end, pieces, scratch};
}

}  // namespace

Plan::Plan(const TreeAttention& args, int threads) {
  check(args);
  group = args.heads / args.kv_heads;
  const std::int64_t height = std::max<std::int64_t>(1, kQueries / group);
  std::int64_t pieces = 0, cost = 0;
  sights.reserve(args.rows);
  for (std::int64_t r = 0; r < args.layout.requests; ++r) {
    const std::int64_t end = args.layout.row_starts[r + 1];
    const std::int64_t slots = args.layout.slot_counts[r];
    for (std::int64_t n = args.layout.row_starts[r]; n < end; ++n) {
      sights.push_back(sight_of(args, n, slots - (end - n)));
    }
    for (std::int64_t n = args.layout.row_starts[r]; n < end; n += height) {
      const RowBlock rows = row_block(sights, r, n, std::min(height, end - n), queries);
      queries += rows.count * group * args.kv_heads * rows.pieces;
      most_queries = std::max(most_queries, rows.count * group);
      pieces += rows.pieces;
      cost += rows.count * (rows.end - rows.begin);
      blocks.push_back(rows);
    }
  }
  const std::int64_t products = cost * args.heads * kBlock * (args.width + args.value_width);
  team = static_cast<int>(std::clamp<std::int64_t>(products / kMinShare, 1, threads));

  const std::int64_t wanted = team > 1 ? team * kTasksPerThread : 1;
  const std::int64_t parts =
      std::clamp<std::int64_t>(wanted / std::max<std::int64_t>(pieces, 1), 1, args.kv_heads);
  most_heads = (args.kv_heads + parts - 1) / parts;
  for (const RowBlock& rows : blocks) {
    for (std::int64_t piece = 0; piece < rows.pieces; ++piece) {
      for (std::int64_t head = 0; head < args.kv_heads; head += most_heads) {
        tasks.push_back({&rows, piece, head, std::min(most_heads, args.kv_heads - head)});
      }
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.cost() > b.cost(); });
}

}  // namespace fastguide
