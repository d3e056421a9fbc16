#pragma once
// Memory in pieces, as guests give it.

#include <algorithm>
#include <span>
#include <vector>

#include "qcow/buffers.h"
#include "support/random.h"

namespace qcow::test {

/// `bytes`, cut at random into at most `most` pieces.
template <class Byte>
std::vector<std::span<Byte>> cut_up(std::span<Byte> bytes, Random& random, std::size_t most = 5) {
    std::vector<std::span<Byte>> pieces;
    while (pieces.size() + 1 < most) {
        const auto length = static_cast<std::size_t>(random.below(2 * bytes.size() / most + 2));
        const auto piece = bytes.first(std::min(length, bytes.size()));
        pieces.push_back(piece);
        bytes = bytes.subspan(piece.size());
    }
    pieces.push_back(bytes);
    return pieces;
}

}  // namespace qcow::test
