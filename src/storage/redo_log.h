#pragma once
// A redo log: the words that a WordCache holds and the file does not have yet, in memory that outlives the process.

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "qcow/disk.h"
#include "qcow/error.h"
#include "qcow/offset.h"

namespace qcow {

/// Records stores to a WordCache. If the process is killed, another one that has the memory can repeat them. The log
/// says nothing about power losses, which take the memory, too.
///
/// The memory has two halves. Stores are recorded in one of them. Whoever writes the changed pages to the file calls
/// begin_writing() before, and end_writing() after: stores go to the other half meanwhile, and the first half is empty
/// at the end.
///
/// Thread safety: append() may be called from any number of threads, also while another one calls the other functions.
class RedoLog {
public:
    /// Shorter memory cannot hold the words of the longest store.
    static constexpr std::size_t min_bytes = std::size_t{64} << 10;

    /// Empties the memory, which begins at a multiple of eight and has at least min_bytes.
    explicit RedoLog(SurvivingMemory memory);

    /// Records that the words from host offset `at` on change. Returns false if there is no room: the changed pages
    /// have to be written first.
    [[nodiscard]] bool append(HostOffset at, std::span<const std::uint64_t> before,
                              std::span<const std::uint64_t> after);

    /// The changed pages are about to be written. All stores that were recorded before are in them.
    void begin_writing();
    /// The pages are in the file.
    void end_writing();

    /// A word that changed.
    struct Store {
        HostOffset at;
        std::uint64_t before = 0;
        std::uint64_t after = 0;
    };

    /// Returns what a killed process left in the memory, in the order of the stores; nothing if it left no log. Nothing
    /// in the memory is trusted: offsets may be any multiple of eight.
    static std::vector<Store> read(std::span<const std::byte> memory);

private:
    struct Half;
    struct Header;

    [[nodiscard]] Header& header() const;
    [[nodiscard]] static std::size_t half_bytes(std::size_t memory_bytes);
    void set_used(std::size_t half, std::size_t bytes);

    SurvivingMemory memory_;
    std::mutex mutex_;
    std::size_t active_ = 0;
    std::array<std::size_t, 2> used_ = {};  // bytes of each half, because those in the memory are not trusted
    std::uint64_t sequence_ = 0;
};

}  // namespace qcow
