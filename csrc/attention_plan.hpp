// How tree_attention divides its work: who sees what, and which parts go to which task.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention.hpp"

namespace fastguide {

constexpr std::int64_t kBlock = 64;     // slots: their keys and scores stay in the caches
constexpr std::int64_t kMaxPieces = 8;  // bounds the memory for unmerged results

// The slots that a row sees, as indices into those of its request.
struct Sight {
  std::int64_t trunk_begin, trunk_end;
  std::int64_t branch_begin, branch_end;

  bool all(std::int64_t begin, std::int64_t end) const {
    return (begin >= trunk_begin && end <= trunk_end) ||
           (begin >= branch_begin && end <= branch_end);
  }
  bool any(std::int64_t begin, std::int64_t end) const {
    return std::max(begin, trunk_begin) < std::min(end, trunk_end) ||
           std::max(begin, branch_begin) < std::min(end, branch_end);
  }
};

// Rows of one request that are worked on together, against one or more pieces of the slots that
// they see. Pieces depend on the request alone, so that nothing else can change its sums.
struct RowBlock {
  std::int64_t request;
  std::int64_t first, count;  // rows
  std::int64_t begin, end;    // blocks of slots
  std::int64_t pieces;
  std::int64_t scratch;  // where its queries begin: for each KV head, for each piece

  std::int64_t piece_begin(std::int64_t piece) const {
    return begin + (end - begin) * piece / pieces;
  }
};

// What one thread does in one go. The heads of a slot lie side by side in memory, so a task takes
// as many of them as leaves enough tasks.
struct Task {
  const RowBlock* rows;
  std::int64_t piece;
  std::int64_t first_head, heads;  // KV heads

  std::int64_t cost() const {
    return rows->count * heads * (rows->piece_begin(piece + 1) - rows->piece_begin(piece));
  }
};

struct Plan {
  // Throws std::invalid_argument, with one sentence, where the layout is not what it should be.
  Plan(const TreeAttention& args, int threads);
  Plan(const Plan&) = delete;  // its tasks point to its blocks

  std::int64_t group;         // query heads of a KV head
  std::vector<Sight> sights;  // of each row
  std::vector<RowBlock> blocks;
  std::vector<Task> tasks;        // the longest first, so that the threads end together
  int team;                       // threads that are worth it
  std::int64_t queries = 0;       // in the scratch: of all heads and pieces
  std::int64_t most_queries = 0;  // of a task and KV head
  std::int64_t most_heads = 0;    // of a task
};

}  // namespace fastguide
