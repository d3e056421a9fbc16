#include "build/ext_blocks.h"

#include <sys/stat.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>

#include "base/bits.h"
#include "filesystem/little_endian.h"

namespace qcow {
namespace {

using Block = std::vector<std::byte>;

}  // namespace

std::vector<DataRun> block_runs(const TreeInode& inode, std::uint64_t block_size) {
    std::vector<DataRun> runs;
    for (const auto& run : inode.runs()) {
        const auto begin = run.start / block_size;
        const auto end = divide_up(run.start + run.length, block_size);
        if (!runs.empty() && begin <= runs.back().start + runs.back().length) {
            runs.back().length = end - runs.back().start;
        } else {
            runs.push_back({begin, end - begin});
        }
    }
    return runs;
}

std::uint64_t largest_file_blocks(bool extents, std::uint64_t block_size) {
    if (extents) return std::numeric_limits<std::uint32_t>::max();
    const auto numbers = block_size / 4;
    return std::min<std::uint64_t>(12 + numbers + numbers * numbers + numbers * numbers * numbers,
                                   std::numeric_limits<std::uint32_t>::max());
}

// ---- Extents ----

namespace {

constexpr std::uint64_t longest_extent = 32768;  // blocks
constexpr std::size_t extent_bytes = 12;         // of a header, too
constexpr std::uint64_t extents_in_inode = 4;

constexpr std::uint64_t extents_in_block(std::uint64_t block_size) {
    return (block_size - extent_bytes) / extent_bytes;
}

struct Link {
    std::uint64_t logical;
    std::uint64_t physical;
    std::uint64_t length;  // 0: `physical` is a block of the tree
};

void store_extents(std::span<std::byte> to, std::span<const Link> links, unsigned depth) {
    store_le<std::uint16_t>(to, 0, 0xf30a);
    store_le(to, 2, static_cast<std::uint16_t>(links.size()));
    store_le(to, 4, static_cast<std::uint16_t>((to.size() - extent_bytes) / extent_bytes));
    store_le(to, 6, static_cast<std::uint16_t>(depth));
    for (std::size_t i = 0; i < links.size(); ++i) {
        const auto at = (i + 1) * extent_bytes;
        const auto low = static_cast<std::uint32_t>(links[i].physical);
        const auto high = static_cast<std::uint16_t>(links[i].physical >> 32);
        store_le(to, at, static_cast<std::uint32_t>(links[i].logical));
        if (depth == 0) {
            store_le(to, at + 4, static_cast<std::uint16_t>(links[i].length));
            store_le(to, at + 6, high);
            store_le(to, at + 8, low);
        } else {
            store_le(to, at + 4, low);
            store_le(to, at + 8, high);
        }
    }
}

}  // namespace

std::uint64_t extent_blocks_at_most(std::span<const DataRun> runs, std::uint64_t block_size) {
    // There is a table for half a group at least.
    const auto half_group = block_size * 4;
    std::uint64_t in_file = 0;
    for (const auto& run : runs) in_file += run.length;
    std::uint64_t blocks = 0;
    for (auto extents = runs.size() + in_file / half_group + 1; extents > extents_in_inode;) {
        extents = divide_up(extents, extents_in_block(block_size));
        blocks += extents;
    }
    return blocks;
}

Result<std::uint64_t> write_extents(std::span<std::byte> root, const std::vector<PhysicalRun>& runs,
                                    const BlockWriter& writer,
                                    const std::function<Result<void>(std::span<std::byte>)>& seal) {
    std::vector<Link> links;
    for (auto run : runs) {
        // Runs that follow each other are one extent.
        if (!links.empty() && links.back().logical + links.back().length == run.logical &&
            links.back().physical + links.back().length == run.physical) {
            const auto more = std::min(run.length, longest_extent - links.back().length);
            links.back().length += more;
            run.logical += more;
            run.physical += more;
            run.length -= more;
        }
        while (run.length > 0) {
            const auto length = std::min(run.length, longest_extent);
            links.push_back({run.logical, run.physical, length});
            run.logical += length;
            run.physical += length;
            run.length -= length;
        }
    }
    std::uint64_t blocks = 0;
    unsigned depth = 0;
    const auto in_block = extents_in_block(writer.block_size);
    for (; links.size() > extents_in_inode; ++depth) {
        std::vector<Link> above;
        for (std::size_t i = 0; i < links.size(); i += in_block) {
            Block block(writer.block_size);
            store_extents(block, std::span(links).subspan(i, std::min(in_block, links.size() - i)), depth);
            TRY_VOID(seal(block));
            const auto number = TRY(writer.take());
            TRY_VOID(writer.write(number, block));
            above.push_back({links[i].logical, number, 0});
            ++blocks;
        }
        links = std::move(above);
    }
    store_extents(root, links, depth);
    return blocks;
}

// ---- Indirect blocks ----

namespace {

constexpr std::uint64_t direct_blocks = 12;

/// Writes the indirect blocks of a file, whose runs it takes from front to back.
class IndirectWriter {
public:
    IndirectWriter(const std::vector<PhysicalRun>& runs, const BlockWriter& writer)
        : runs_(runs), writer_(writer), numbers_(writer.block_size / 4) {}

    /// The block that stands for [logical, logical + numbers^level); 0 if all of that is a hole.
    Result<std::uint32_t> block_for(std::uint64_t logical, unsigned level) {
        while (run_ < runs_.size() && runs_[run_].logical + runs_[run_].length <= logical) ++run_;
        std::uint64_t covered = 1;
        for (unsigned i = 0; i < level; ++i) covered *= numbers_;
        if (run_ == runs_.size() || runs_[run_].logical >= logical + covered) return 0;
        if (level == 0) return static_cast<std::uint32_t>(runs_[run_].physical + (logical - runs_[run_].logical));
        const auto number = TRY(writer_.take());
        Block block(writer_.block_size);
        for (std::uint64_t i = 0; i < numbers_; ++i)
            store_le(block, i * 4, TRY(block_for(logical + i * (covered / numbers_), level - 1)));
        TRY_VOID(writer_.write(number, block));
        ++written_;
        return static_cast<std::uint32_t>(number);
    }

    [[nodiscard]] std::uint64_t written() const { return written_; }
    [[nodiscard]] std::uint64_t numbers() const { return numbers_; }

private:
    const std::vector<PhysicalRun>& runs_;
    const BlockWriter& writer_;
    std::uint64_t numbers_;  // in a block
    std::size_t run_ = 0;
    std::uint64_t written_ = 0;
};

}  // namespace

std::uint64_t indirect_blocks(std::span<const DataRun> runs, std::uint64_t block_size) {
    const auto numbers = block_size / 4;
    std::uint64_t count = 0;
    auto first = direct_blocks;  // the blocks of the file that a tree of indirect blocks leads to
    auto length = numbers;
    for (unsigned depth = 1; depth <= 3; ++depth, first += length, length *= numbers) {
        std::uint64_t covered = 1;  // by one indirect block
        for (unsigned level = 1; level <= depth; ++level) {
            covered *= numbers;
            std::uint64_t behind = 0;  // the last block that was counted
            for (const auto& run : runs) {
                const auto begin = std::max(run.start, first);
                const auto end = std::min(run.start + run.length, first + length);
                if (begin >= end) continue;
                const auto last = (end - 1 - first) / covered + 1;
                count += last - std::min(last, std::max((begin - first) / covered, behind));
                behind = last;
            }
        }
    }
    return count;
}

Result<std::uint64_t> write_indirect_blocks(std::span<std::byte> root, const std::vector<PhysicalRun>& runs,
                                            const BlockWriter& writer) {
    IndirectWriter indirect(runs, writer);
    for (std::uint64_t i = 0; i < direct_blocks; ++i) store_le(root, i * 4, TRY(indirect.block_for(i, 0)));
    auto logical = direct_blocks;
    auto covered = indirect.numbers();
    for (unsigned level = 1; level <= 3; ++level, covered *= indirect.numbers()) {
        store_le(root, (direct_blocks + level - 1) * 4, TRY(indirect.block_for(logical, level)));
        logical += covered;
    }
    return indirect.written();
}

// ---- Directories ----

namespace {

constexpr std::uint64_t tail_bytes = 12;       // of a block with a checksum
constexpr std::uint64_t index_tail_bytes = 8;  // of an index block
constexpr std::uint64_t root_header = 32;      // "." and "..", and what the index says of itself
constexpr std::uint64_t node_header = 8;
constexpr std::uint8_t half_md4 = 1;

std::uint64_t ext_entry_bytes(std::size_t name) { return 8 + divide_up(name, 4) * 4; }

std::uint8_t type_of(mode_t mode) {
    switch (mode & S_IFMT) {
        case S_IFREG: return 1;
        case S_IFDIR: return 2;
        case S_IFCHR: return 3;
        case S_IFBLK: return 4;
        case S_IFIFO: return 5;
        case S_IFSOCK: return 6;
        case S_IFLNK: return 7;
        default: return 0;
    }
}

/// A block of entries, filled from the front.
class EntryBlock {
public:
    explicit EntryBlock(const DirectoryShape& shape)
        : bytes_(shape.block_size), end_(shape.block_size - (shape.checksums ? tail_bytes : 0)) {}

    [[nodiscard]] bool fits(std::string_view name) const { return ext_entry_bytes(name.size()) <= end_ - used_; }

    void add(std::uint32_t inode, std::string_view name, std::uint8_t type) {
        last_ = used_;
        const auto length = ext_entry_bytes(name.size());
        store_le(bytes_, used_, inode);
        store_le(bytes_, used_ + 4, static_cast<std::uint16_t>(length));
        bytes_[used_ + 6] = static_cast<std::byte>(name.size());
        bytes_[used_ + 7] = static_cast<std::byte>(type);
        std::memcpy(bytes_.data() + used_ + 8, name.data(), name.size());
        used_ += length;
    }

    /// The last entry takes what is left.
    [[nodiscard]] Block take() {
        if (used_ == 0) {
            store_le(bytes_, 4, static_cast<std::uint16_t>(end_));  // an entry of nothing
        } else {
            store_le(bytes_, last_ + 4, static_cast<std::uint16_t>(end_ - last_));
        }
        if (end_ < bytes_.size()) {
            store_le(bytes_, end_ + 4, static_cast<std::uint16_t>(tail_bytes));
            bytes_[end_ + 7] = std::byte{0xde};
        }
        return std::move(bytes_);
    }

private:
    Block bytes_;
    std::uint64_t end_;
    std::uint64_t used_ = 0;
    std::uint64_t last_ = 0;
};

std::uint64_t index_entries(const DirectoryShape& shape, std::uint64_t header) {
    return (shape.block_size - header - (shape.checksums ? index_tail_bytes : 0)) / 8;
}

struct IndexEntry {
    std::uint32_t hash;
    std::uint32_t block;
};

/// The entries of an index block. Where the hash of the first one would be are the limit and the count.
void store_index(Block& block, std::uint64_t header, std::uint64_t limit, std::span<const IndexEntry> entries) {
    for (std::size_t i = 0; i < entries.size(); ++i) {
        store_le(block, header + i * 8, entries[i].hash);
        store_le(block, header + i * 8 + 4, entries[i].block);
    }
    store_le(block, header, static_cast<std::uint16_t>(limit));
    store_le(block, header + 2, static_cast<std::uint16_t>(entries.size()));
}

}  // namespace

std::uint64_t blocks_of_directory(const Children& children, const DirectoryShape& shape) {
    std::uint64_t bytes = 24;
    for (const auto& entry : children.entries()) bytes += ext_entry_bytes(entry.name.text().size());
    // The longest entry may be what does not fit at the end of a block.
    const auto room = shape.block_size - tail_bytes;
    const auto blocks = bytes <= room ? 1 : divide_up(bytes, room - ext_entry_bytes(longest_name));
    if (blocks == 1 || !shape.indexed) return blocks;
    return blocks + 2 + blocks / index_entries(shape, node_header);
}

std::vector<std::byte> empty_directory_block(const DirectoryShape& shape) { return EntryBlock(shape).take(); }

struct Directory::Hashed {
    std::uint32_t major;
    std::uint32_t minor;
    const TreeEntry* entry;
};

DirectoryBlocks Directory::linear(const DirectoryShape& shape) const {
    DirectoryBlocks result;
    EntryBlock block(shape);
    block.add(own_, ".", 2);
    block.add(parent_, "..", 2);
    for (const auto& entry : children_.entries()) {
        const auto name = entry.name.text();
        if (!block.fits(name)) {
            result.blocks.push_back(block.take());
            block = EntryBlock(shape);
        }
        block.add(entry.inode->number, name, type_of(entry.inode->mode));
    }
    result.blocks.push_back(block.take());
    return result;
}

std::optional<DirectoryBlocks> Directory::blocks(const DirectoryShape& shape, const NameHash& hash) const {
    auto result = linear(shape);
    if (!shape.indexed || result.blocks.size() == 1) return result;

    std::vector<Hashed> sorted;
    sorted.reserve(children_.size());
    for (const auto& entry : children_.entries()) {
        const auto [major, minor] = hash(entry.name.text());
        sorted.push_back({major, minor, &entry});
    }
    std::ranges::sort(sorted, [](const Hashed& a, const Hashed& b) {
        return std::tuple(a.major, a.minor, a.entry->name.text()) < std::tuple(b.major, b.minor, b.entry->name.text());
    });
    std::vector<Block> leaves;
    std::vector<IndexEntry> index = {{0, 0}};
    EntryBlock leaf(shape);
    std::uint32_t last_hash = 0;
    for (const auto& [major, minor, entry] : sorted) {
        const auto name = entry->name.text();
        if (!leaf.fits(name)) {
            leaves.push_back(leaf.take());
            leaf = EntryBlock(shape);
            // The lowest bit says that names with this hash are in the leaf before, too.
            index.push_back({major | (major == last_hash ? 1U : 0U), 0});
        }
        last_hash = major;
        leaf.add(entry->inode->number, name, type_of(entry->inode->mode));
    }
    leaves.push_back(leaf.take());

    // The root comes first, then the nodes, if there are any, then the leaves.
    const auto in_root = index_entries(shape, root_header);
    const auto in_node = index_entries(shape, node_header);
    const auto nodes = index.size() <= in_root ? 0 : divide_up(index.size(), in_node);
    if (nodes > in_root) return {};
    for (std::size_t i = 0; i < index.size(); ++i) index[i].block = static_cast<std::uint32_t>(1 + nodes + i);

    Block root(shape.block_size);
    store_le(root, 0, own_);
    store_le<std::uint16_t>(root, 4, 12);
    root[6] = std::byte{1};
    root[7] = std::byte{2};
    root[8] = std::byte{'.'};
    store_le(root, 12, parent_);
    store_le(root, 16, static_cast<std::uint16_t>(shape.block_size - 12));
    root[18] = std::byte{2};
    root[19] = std::byte{2};
    root[20] = root[21] = std::byte{'.'};
    root[28] = std::byte{half_md4};
    root[29] = std::byte{8};  // the length of this information
    root[30] = static_cast<std::byte>(nodes == 0 ? 0 : 1);

    result.indexed = true;
    result.blocks.clear();
    if (nodes == 0) {
        store_index(root, root_header, in_root, index);
        result.blocks.push_back(std::move(root));
    } else {
        std::vector<IndexEntry> above;
        std::vector<Block> node_blocks;
        for (std::size_t i = 0; i < index.size(); i += in_node) {
            Block node(shape.block_size);
            store_le(node, 4, static_cast<std::uint16_t>(shape.block_size));
            above.push_back({index[i].hash, static_cast<std::uint32_t>(1 + node_blocks.size())});
            store_index(node, node_header, in_node, std::span(index).subspan(i, std::min(in_node, index.size() - i)));
            node_blocks.push_back(std::move(node));
        }
        store_index(root, root_header, in_root, above);
        result.blocks.push_back(std::move(root));
        std::ranges::move(node_blocks, std::back_inserter(result.blocks));
    }
    std::ranges::move(leaves, std::back_inserter(result.blocks));
    return result;
}

}  // namespace qcow
