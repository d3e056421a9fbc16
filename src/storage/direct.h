#pragma once
// Direct I/O: what it demands, and a Storage that demands nothing on top of one that does.

#include <cstdint>
#include <memory>

#include "qcow/storage.h"

namespace qcow {

/// What each request must be a multiple of. Powers of two.
struct DirectAlignment {
    std::uint64_t block = 4096;   ///< offset and length in the file
    std::uint64_t memory = 4096;  ///< the address of the caller's memory
};

/// A Storage that takes requests of any kind and makes aligned ones to `file` of them. Part of a block is changed by
/// reading and writing the whole; the file's length is nevertheless what writes make it, to the byte.
std::shared_ptr<Storage> direct_storage(std::shared_ptr<Storage> file, DirectAlignment alignment);

}  // namespace qcow
