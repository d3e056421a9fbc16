#include "filesystem/ext_io.h"

#include <et/com_err.h>
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <span>
#include <utility>

#include "base/within_memory.h"

namespace qcow {
namespace {

constexpr std::uint64_t all_units = ~std::uint64_t{0};
/// Longer requests pass the cache: they gain nothing by it.
constexpr std::uint64_t longest_cached = 256 * KiB;
/// Dirty chunks leave in requests of at most this many bytes.
constexpr std::size_t longest_write = 4 * MiB;

/// libext2fs gives the open function of a manager only a name. So the object that opens says here who it is.
thread_local ExtIo* opening = nullptr;

/// The bits of the units that [begin, end) touches, both within a chunk.
std::uint64_t touched(std::uint64_t begin, std::uint64_t end, std::uint64_t unit) {
    const std::uint64_t first = begin / unit;
    const std::uint64_t count = divide_up(end, unit) - first;
    return (count == 64 ? all_units : low_bits(static_cast<unsigned>(count))) << first;
}

ExtIo& io_of(io_channel channel) { return *static_cast<ExtIo*>(channel->private_data); }

struct Range {
    std::uint64_t at;
    std::uint64_t length;
};

/// A negative count is a number of bytes.
Range range_of(io_channel channel, unsigned long long block, long long count) {
    const auto size = static_cast<std::uint64_t>(channel->block_size);
    const auto magnitude = static_cast<std::uint64_t>(count < 0 ? -count : count);
    std::uint64_t at = 0;
    std::uint64_t length = magnitude;
    bool overflows = __builtin_mul_overflow(block, size, &at);
    if (count >= 0) overflows |= __builtin_mul_overflow(magnitude, size, &length);
    return overflows ? Range{all_units, 1} : Range{at, length};  // no disk has this
}

/// Runs `work` for libext2fs, which is C: no exception may pass.
template <class Work>
errcode_t run(io_channel channel, errcode_t code, Work&& work) {
    auto& io = io_of(channel);
    auto done = within_memory([&]() -> Result<void> { return work(io); });
    return done ? 0 : io.remember(std::move(done).error(), code);
}

errcode_t open_channel(const char*, int, io_channel* made);

errcode_t close_channel(io_channel channel) {
    if (--channel->refcount > 0) return 0;
    const auto code = run(channel, EXT2_ET_SHORT_WRITE, [](ExtIo& io) { return io.flush(); });
    delete channel;
    return code;
}

errcode_t set_block_size(io_channel channel, int size) {
    channel->block_size = size;
    return 0;
}

errcode_t read_blocks(io_channel channel, unsigned long long block, int count, void* to) {
    const auto [at, length] = range_of(channel, block, count);
    return run(channel, EXT2_ET_SHORT_READ,
               [&](ExtIo& io) { return io.read(at, std::span(static_cast<std::byte*>(to), length)); });
}

errcode_t write_blocks(io_channel channel, unsigned long long block, int count, const void* from) {
    const auto [at, length] = range_of(channel, block, count);
    return run(channel, EXT2_ET_SHORT_WRITE,
               [&](ExtIo& io) { return io.write(at, std::span(static_cast<const std::byte*>(from), length)); });
}

errcode_t read_blocks_32(io_channel channel, unsigned long block, int count, void* to) {
    return read_blocks(channel, block, count, to);
}

errcode_t write_blocks_32(io_channel channel, unsigned long block, int count, const void* from) {
    return write_blocks(channel, block, count, from);
}

errcode_t write_bytes(io_channel channel, unsigned long at, int size, const void* from) {
    const auto length = static_cast<std::size_t>(size);
    return run(channel, EXT2_ET_SHORT_WRITE,
               [&](ExtIo& io) { return io.write(at, std::span(static_cast<const std::byte*>(from), length)); });
}

errcode_t flush_channel(io_channel channel) {
    return run(channel, EXT2_ET_SHORT_WRITE, [](ExtIo& io) { return io.flush(); });
}

errcode_t discard_blocks(io_channel channel, unsigned long long block, unsigned long long count) {
    const auto [at, length] = range_of(channel, block, static_cast<long long>(count));
    return run(channel, EXT2_ET_SHORT_WRITE, [&](ExtIo& io) { return io.discard(at, length); });
}

errcode_t zero_blocks(io_channel channel, unsigned long long block, unsigned long long count) {
    const auto [at, length] = range_of(channel, block, static_cast<long long>(count));
    return run(channel, EXT2_ET_SHORT_WRITE, [&](ExtIo& io) { return io.zero(at, length); });
}

errcode_t set_option(io_channel, const char*, const char*) { return EXT2_ET_INVALID_ARGUMENT; }

struct_io_manager make_manager() {
    struct_io_manager manager = {};
    manager.magic = EXT2_ET_MAGIC_IO_MANAGER;
    manager.name = "disk";
    manager.open = open_channel;
    manager.close = close_channel;
    manager.set_blksize = set_block_size;
    manager.read_blk = read_blocks_32;
    manager.write_blk = write_blocks_32;
    manager.flush = flush_channel;
    manager.write_byte = write_bytes;
    manager.set_option = set_option;
    manager.read_blk64 = read_blocks;
    manager.write_blk64 = write_blocks;
    manager.discard = discard_blocks;
    manager.zeroout = zero_blocks;
    return manager;
}

io_manager the_manager() {
    static struct_io_manager manager = make_manager();
    return &manager;
}

errcode_t open_channel(const char*, int, io_channel* made) {
    static char name[] = "disk";
    auto* channel = new (std::nothrow) struct_io_channel{};
    if (channel == nullptr) return EXT2_ET_NO_MEMORY;
    channel->magic = EXT2_ET_MAGIC_IO_CHANNEL;
    channel->manager = the_manager();
    channel->name = name;
    channel->block_size = 1024;
    channel->refcount = 1;
    channel->private_data = opening;
    *made = channel;
    return 0;
}

}  // namespace

ExtIo::ExtIo(Disk& disk, std::size_t cache_bytes)
    : disk_(disk), most_chunks_(std::max<std::size_t>(cache_bytes / chunk_bytes, 16)) {
    static const bool texts_known = (initialize_ext2_error_table(), true);
    static_cast<void>(texts_known);
}

ExtIo::~ExtIo() = default;

Result<ext2_filsys> ExtIo::opened(errcode_t code, ext2_filsys made) {
    opening = nullptr;
    TRY_VOID(verify(code, "ext file system"));
    return made;
}

Result<ext2_filsys> ExtIo::open(int flags, unsigned superblock, unsigned block_size) {
    ext2_filsys made = nullptr;
    opening = this;
    const auto code = ext2fs_open2("disk", nullptr, flags | EXT2_FLAG_64BITS, static_cast<int>(superblock), block_size,
                                   the_manager(), &made);
    return opened(code, made);
}

Result<ext2_filsys> ExtIo::initialize(int flags, ext2_super_block& parameters) {
    ext2_filsys made = nullptr;
    opening = this;
    const auto code = ext2fs_initialize("disk", flags | EXT2_FLAG_64BITS, &parameters, the_manager(), &made);
    return opened(code, made);
}

Result<void> ExtIo::verify(errcode_t code, std::string_view place) {
    if (error_) {
        auto error = *std::exchange(error_, std::nullopt);
        if (code != 0) return std::unexpected(std::move(error).in(place));
    }
    if (code == 0) return {};
    Errc kind = Errc::corrupt;
    if (code == EXT2_ET_NO_MEMORY) kind = Errc::no_memory;
    if (code == EXT2_ET_FILE_NOT_FOUND) kind = Errc::not_found;
    if (code == EXT2_ET_RO_FILSYS) kind = Errc::read_only;
    if (code == EXT2_ET_UNSUPP_FEATURE || code == EXT2_ET_RO_UNSUPP_FEATURE) kind = Errc::unsupported;
    if (code == EXT2_ET_BLOCK_ALLOC_FAIL || code == EXT2_ET_INODE_ALLOC_FAIL || code == EXT2_ET_DIR_NO_SPACE ||
        code == EXT2_ET_TOOSMALL || code == EXT2_ET_EA_NO_SPACE)
        kind = Errc::no_space;
    if (code == EXT2_ET_FILE_TOO_BIG) kind = Errc::invalid_argument;
    const auto* text = error_message(code);
    if (code == EXT2_ET_FILE_TOO_BIG) text = "the file would be longer than this file system allows";
    if (kind == Errc::no_space) text = "the file system is full";
    if (code == EXT2_ET_EA_NO_SPACE) text = "ext has no room for extended attributes as long as these";
    if (code == EXT2_ET_INODE_ALLOC_FAIL) text = "the file system has no free inode, so it takes no more files";
    return fail(kind, std::string(place), text);
}

errcode_t ExtIo::remember(Error error, errcode_t code) {
    failed_ = true;
    if (!error_) error_ = std::move(error);
    return code;
}

// ---- The cache ----

Result<void> ExtIo::fill(std::uint64_t start, Chunk& chunk) {
    if (chunk.valid == all_units) return {};
    const std::uint64_t stored = std::min(chunk_bytes, disk_.size() - start);
    if (chunk.valid == 0) {
        TRY_VOID(disk_.read({start}, std::span(chunk.bytes).first(stored)));
    } else {
        std::vector<std::byte> below(chunk_bytes);
        TRY_VOID(disk_.read({start}, std::span(below).first(stored)));
        for (unsigned i = 0; i < 64; ++i) {
            if ((chunk.valid & bit(i)) != 0) continue;
            std::memcpy(chunk.bytes.data() + i * unit_bytes, below.data() + i * unit_bytes, unit_bytes);
        }
    }
    chunk.valid = all_units;
    return {};
}

Result<ExtIo::Chunk*> ExtIo::chunk_at(std::uint64_t start) {
    if (const auto found = chunks_.find(start); found != chunks_.end()) {
        found->second.used = ++clock_;
        return &found->second;
    }
    TRY_VOID(make_room());
    auto& chunk = chunks_[start];
    chunk.bytes.resize(chunk_bytes);
    chunk.used = ++clock_;
    return &chunk;
}

/// Drops the half of the chunks that was not used for longest, so that the search for them is rare.
Result<void> ExtIo::make_room() {
    if (chunks_.size() < most_chunks_) return {};
    TRY_VOID(write_back());
    std::vector<std::uint64_t> uses;
    uses.reserve(chunks_.size());
    for (const auto& [start, chunk] : chunks_) uses.push_back(chunk.used);
    const auto middle = uses.begin() + static_cast<std::ptrdiff_t>(uses.size() / 2);
    std::ranges::nth_element(uses, middle);
    std::erase_if(chunks_, [last = *middle](const auto& entry) { return entry.second.used <= last; });
    return {};
}

Result<void> ExtIo::write_back() {
    const auto is_dirty = [](const auto& entry) { return entry.second.dirty != 0; };
    for (unsigned stage = 0; stage < stages_ && std::ranges::any_of(chunks_, is_dirty); ++stage) {
        // Also what passed the cache.
        if (stage > 0 && std::exchange(written_, false)) TRY_VOID(disk_.flush());
        TRY_VOID(write_stage(stage));
    }
    return {};
}

/// The dirty units of a chunk that belong to a stage.
std::uint64_t ExtIo::units_of_stage(std::uint64_t start, std::uint64_t dirty, unsigned stage) const {
    if (!stage_of_) return dirty;
    std::uint64_t units = 0;
    for (std::uint64_t left = dirty; left != 0; left &= left - 1) {
        const auto unit = static_cast<unsigned>(std::countr_zero(left));
        if (stage_of_(start + unit * unit_bytes) == stage) units |= bit(unit);
    }
    return units;
}

Result<void> ExtIo::write_stage(unsigned stage) {
    std::vector<std::span<const std::byte>> pieces;
    std::vector<std::pair<Chunk*, std::uint64_t>> written;  // the units that the pieces cover
    std::uint64_t begin = 0;
    std::uint64_t end = 0;
    const auto write_pieces = [&]() -> Result<void> {
        if (pieces.empty()) return {};
        written_ = true;
        TRY_VOID(disk_.write({begin}, ConstBuffers(std::span<const std::span<const std::byte>>(pieces))));
        for (auto& [chunk, units] : written) chunk->dirty &= ~units;
        pieces.clear();
        written.clear();
        return {};
    };
    for (auto& [start, chunk] : chunks_) {
        for (std::uint64_t left = units_of_stage(start, chunk.dirty, stage); left != 0;) {
            const auto first = static_cast<unsigned>(std::countr_zero(left));
            const auto count = static_cast<unsigned>(std::countr_one(left >> first));
            const std::uint64_t units = (count == 64 ? all_units : low_bits(count)) << first;
            left &= ~units;
            const std::uint64_t at = start + first * unit_bytes;
            const std::uint64_t length = std::min<std::uint64_t>(count * unit_bytes, disk_.size() - at);
            if (at != end || end - begin >= longest_write) {
                TRY_VOID(write_pieces());
                begin = at;
            }
            pieces.emplace_back(chunk.bytes.data() + first * unit_bytes, length);
            written.emplace_back(&chunk, units);
            end = at + length;
        }
    }
    return write_pieces();
}

/// Drops what the cache knows of a range that is about to be changed past it.
Result<void> ExtIo::forget(std::uint64_t at, std::uint64_t length) {
    written_ = true;
    const std::uint64_t end = at + length;
    auto next = chunks_.lower_bound(align_down(at, chunk_bytes));
    while (next != chunks_.end() && next->first < end) {
        auto& [start, chunk] = *next;
        if (start >= at && start + chunk_bytes <= end) {
            next = chunks_.erase(next);
            continue;
        }
        const std::uint64_t first = std::max(at, start) - start;
        const std::uint64_t last = std::min(end - start, chunk_bytes);
        // Units that the range covers in part keep their dirty bytes: they are written first.
        if (!is_aligned(first, unit_bytes) || !is_aligned(last, unit_bytes)) TRY_VOID(write_back());
        const std::uint64_t units = touched(first, last, unit_bytes);
        chunk.valid &= ~units;
        chunk.dirty &= ~units;
        ++next;
    }
    return {};
}

// ---- What libext2fs calls ----

Result<void> ExtIo::verify_range(std::uint64_t at, std::uint64_t length, Errc code) const {
    if (lies_within(at, length, disk_.size())) return {};
    return fail(code, "", fmt::format("offset {} lies past the end of the disk ({} bytes)", at, disk_.size()));
}

Result<void> ExtIo::read(std::uint64_t at, std::span<std::byte> to) {
    TRY_VOID(verify_range(at, to.size(), Errc::corrupt));
    if (to.size() > longest_cached) {
        TRY_VOID(write_back());
        return disk_.read({at}, to);
    }
    while (!to.empty()) {
        const std::uint64_t start = align_down(at, chunk_bytes);
        const std::uint64_t inside = at - start;
        const auto length = std::min<std::uint64_t>(to.size(), chunk_bytes - inside);
        auto& chunk = *TRY(chunk_at(start));
        const std::uint64_t units = touched(inside, inside + length, unit_bytes);
        if ((chunk.valid & units) != units) TRY_VOID(fill(start, chunk));
        std::memcpy(to.data(), chunk.bytes.data() + inside, length);
        at += length;
        to = to.subspan(length);
    }
    return {};
}

Result<void> ExtIo::write(std::uint64_t at, std::span<const std::byte> from) {
    TRY_VOID(verify_range(at, from.size(), Errc::no_space));
    if (from.size() > longest_cached) {
        TRY_VOID(forget(at, from.size()));
        return disk_.write({at}, from);
    }
    while (!from.empty()) {
        const std::uint64_t start = align_down(at, chunk_bytes);
        const std::uint64_t inside = at - start;
        const auto length = std::min<std::uint64_t>(from.size(), chunk_bytes - inside);
        auto& chunk = *TRY(chunk_at(start));
        if (!is_aligned(inside, unit_bytes) || !is_aligned(length, unit_bytes)) TRY_VOID(fill(start, chunk));
        std::memcpy(chunk.bytes.data() + inside, from.data(), length);
        const std::uint64_t units = touched(inside, inside + length, unit_bytes);
        chunk.valid |= units;
        chunk.dirty |= units;
        at += length;
        from = from.subspan(length);
    }
    return {};
}

Result<void> ExtIo::zero(std::uint64_t at, std::uint64_t length) {
    TRY_VOID(verify_range(at, length, Errc::no_space));
    TRY_VOID(forget(at, length));
    return disk_.write_zeroes({at}, length);
}

Result<void> ExtIo::discard(std::uint64_t at, std::uint64_t length) {
    TRY_VOID(verify_range(at, length, Errc::no_space));
    TRY_VOID(forget(at, length));
    return disk_.discard({at}, length);
}

Result<void> ExtIo::flush() {
    TRY_VOID(write_back());
    if (!written_) return {};
    TRY_VOID(disk_.flush());
    written_ = false;
    return {};
}

}  // namespace qcow
