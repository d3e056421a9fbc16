#pragma once
// The I/O manager of libext2fs over a Disk.

#include <ext2fs/ext2fs.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "base/bits.h"
#include "base/try.h"
#include "qcow/disk.h"

namespace qcow {

/// Lets libext2fs work on a Disk. It keeps recently used chunks of 64 KiB in memory. Writes stay there until they are
/// flushed or until memory is short. Then all of them leave in the order of the disk, as long as neighbours reach.
///
/// The disk and this object must outlive the file system. Close the file system first.
/// Thread safety: one thread at a time, as libext2fs.
class ExtIo {
public:
    static constexpr std::size_t default_cache_bytes = 16 * MiB;

    explicit ExtIo(Disk& disk, std::size_t cache_bytes = default_cache_bytes);
    ExtIo(const ExtIo&) = delete;
    ExtIo& operator=(const ExtIo&) = delete;
    ~ExtIo();

    /// Opens a file system. `flags` as for ext2fs_open; EXT2_FLAG_64BITS is added. `superblock` and `block_size` are 0
    /// for the primary superblock. The caller closes the result (ext2fs_close_free).
    Result<ext2_filsys> open(int flags, unsigned superblock = 0, unsigned block_size = 0);

    /// Begins a new file system with ext2fs_initialize. Nothing is written before the caller writes or flushes it.
    Result<ext2_filsys> initialize(int flags, ext2_super_block& parameters);

    /// Turns what a function of libext2fs returned into a Result. If the disk caused the failure, the result is the
    /// error of the disk. Otherwise it is `place`, and the text of libext2fs.
    Result<void> verify(errcode_t code, std::string_view place);

    /// Blocks leave in stages from now on, each durable before the next: first those for which `stage_of` gives 0, of
    /// the offset of their first byte, then 1 and so on below `stages`.
    void write_in_stages(unsigned stages, std::function<unsigned(std::uint64_t at)> stage_of) {
        stages_ = stages;
        stage_of_ = std::move(stage_of);
    }

    // What libext2fs calls. `at` and sizes in bytes.

    Result<void> read(std::uint64_t at, std::span<std::byte> to);
    Result<void> write(std::uint64_t at, std::span<const std::byte> from);
    Result<void> zero(std::uint64_t at, std::uint64_t length);
    Result<void> discard(std::uint64_t at, std::uint64_t length);
    /// Writes what is in memory, and makes it durable. Without writes, it does nothing.
    Result<void> flush();
    /// Forgets what is in memory and not yet written.
    void abandon() { chunks_.clear(); }

    /// Whether the disk ever failed: what was to be written may not be there.
    [[nodiscard]] bool failed() const { return failed_; }

    /// Keeps the first error of the disk for verify, and returns its errcode_t.
    errcode_t remember(Error error, errcode_t code);

private:
    static constexpr std::uint64_t chunk_bytes = 64 * KiB;
    static constexpr std::uint64_t unit_bytes = KiB;  // the smallest block of ext

    struct Chunk {
        std::vector<std::byte> bytes;
        std::uint64_t valid = 0;  // a bit per unit
        std::uint64_t dirty = 0;  // a bit per unit; these are valid
        std::uint64_t used = 0;   // the clock when it was last used
    };

    [[nodiscard]] Result<void> verify_range(std::uint64_t at, std::uint64_t length, Errc code) const;
    Result<ext2_filsys> opened(errcode_t code, ext2_filsys made);
    Result<Chunk*> chunk_at(std::uint64_t start);
    Result<void> fill(std::uint64_t start, Chunk& chunk);
    Result<void> make_room();
    Result<void> write_back();
    Result<void> write_stage(unsigned stage);
    [[nodiscard]] std::uint64_t units_of_stage(std::uint64_t start, std::uint64_t dirty, unsigned stage) const;
    Result<void> forget(std::uint64_t at, std::uint64_t length);

    Disk& disk_;
    std::size_t most_chunks_;
    std::map<std::uint64_t, Chunk> chunks_;  // by the offset of their first byte
    std::uint64_t clock_ = 0;
    unsigned stages_ = 1;
    std::function<unsigned(std::uint64_t)> stage_of_;  // empty: all is of one stage
    std::optional<Error> error_;
    bool failed_ = false;
    bool written_ = false;  // since the last flush
};

}  // namespace qcow
