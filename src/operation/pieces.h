#pragma once
// Work on the pieces of a disk, in any order, on several threads.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <mutex>

#include "base/bits.h"
#include "base/going_on.h"
#include "base/workers.h"
#include "qcow/offset.h"

namespace qcow {

/// What one worker does at a time: a whole number of blocks, however large these are.
inline constexpr std::uint64_t piece_bytes = 2 * MiB;

/// Calls `work(piece, memory)` for each piece of a disk of `size` bytes, from `workers` threads (0: one per processor).
/// A piece begins at a multiple of `piece_bytes`. `memory` belongs to the thread. After an error or a cancellation, no
/// further piece is begun. Returns the first error. Progress is in bytes of the disk.
template <class Memory, class Work>
Result<void> run_in_pieces(std::uint64_t size, unsigned workers, const JobControl& control, const Work& work) {
    std::atomic<std::uint64_t> next = 0;
    std::atomic<bool> failed = false;
    std::mutex mutex;  // of the progress
    std::uint64_t done = 0;
    const auto perform = [&](GuestRange piece, Memory& memory) -> Result<void> {
        TRY_VOID(verify_goes_on(control));
        TRY_VOID(work(piece, memory));
        if (!control.progress) return {};
        const std::lock_guard lock(mutex);
        control.progress(done += piece.length, size);
        return {};
    };
    return run_workers(workers == 0 ? default_workers() : workers, [&](unsigned) -> Result<void> {
        Memory memory;
        for (auto at = next.fetch_add(piece_bytes); at < size && !failed; at = next.fetch_add(piece_bytes)) {
            auto performed = perform({{at}, std::min(size - at, piece_bytes)}, memory);
            if (performed) continue;
            failed = true;
            return performed;
        }
        return {};
    });
}

}  // namespace qcow
