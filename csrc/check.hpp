// Errors of the border: one sentence that names the argument, what is allowed and what came.
#pragma once

#include <sstream>
#include <stdexcept>

namespace fastguide {

// As in refuse("k must be at least 1, not ", k).
template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts) << '.';
  throw std::invalid_argument(sentence.str());
}

}  // namespace fastguide
