#include "qcow2/metadata/refcounts.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <set>

#include "base/try.h"

namespace qcow::qcow2 {
namespace {

constexpr std::size_t max_words = 512;        // a page of the cache
constexpr std::uint64_t sector_entries = 64;  // of the table, in 512 bytes

}  // namespace

struct Refcounts::Growth {
    std::uint64_t first = 0;            // where the new blocks begin, one behind the other
    std::vector<std::uint64_t> blocks;  // their places in the table
    std::uint64_t table_clusters = 0;   // of a new table behind them; 0: the old one is large enough
    [[nodiscard]] ClusterRun run() const { return {first, blocks.size() + table_clusters}; }
};

Result<void> make_zeros(Storage& file, HostOffset at, std::uint64_t length) {
    const std::uint64_t size = TRY(file.size());
    if (at.value < size) TRY_VOID(file.write_zeroes(at, std::min(length, size - at.value)));
    return at.value + length > size ? file.resize(at.value + length) : Result<void>();
}

Refcounts::Refcounts(Metadata& metadata, WriteBack& write_back, MetadataMap& map)
    : metadata_(metadata),
      write_back_(write_back),
      map_(map),
      cluster_bits_(metadata.header().cluster_bits),
      order_(metadata.header().refcount_order),
      per_block_(format::refcounts_per_block(cluster_bits_, order_)) {}

Result<void> Refcounts::load() {
    const auto header = metadata_.state();
    std::vector<std::byte> bytes(std::size_t{header.refcount_table_clusters} << cluster_bits_);
    TRY(metadata_.file().read(header.refcount_table, bytes));
    table_.resize(bytes.size() / 8);
    for (std::size_t i = 0; i < table_.size(); ++i) {
        const format::RefcountTableEntry entry{load_be<std::uint64_t>(bytes, i * 8)};
        if (!is_aligned(entry.block().value, bit(cluster_bits_)) || entry.block().value >= format::max_host_offset) {
            return fail(
                Errc::corrupt, fmt::format("{}: refcount table entry {}", metadata_.file().name(), i),
                fmt::format("the block's offset {:#x} is not a multiple of the cluster size", entry.block().value));
        }
        if (entry.block().value != 0 && i * per_block_ >= format::max_host_offset >> cluster_bits_) {
            return fail(Errc::corrupt, fmt::format("{}: refcount table entry {}", metadata_.file().name(), i),
                        "it counts clusters where no file can have any");
        }
        table_[i] = entry.block().value;
    }
    return {};
}

Result<std::uint64_t> Refcounts::get(std::uint64_t cluster) const {
    if (!has_block(cluster / per_block_)) return 0;
    const std::uint64_t index = cluster % per_block_;
    const auto word = TRY(metadata_.words().load({table_[cluster / per_block_] + (index >> (6 - order_)) * 8}));
    return format::refcount_in(word, index, order_);
}

/// Calls `visit` for the clusters of the run that one page of the cache has the refcounts of: with the page's words,
/// the host offset of the first, the refcount's index in them, and the number.
template <class Visit>
Result<void> Refcounts::each_span(ClusterRun run, Visit&& visit) const {
    const unsigned per_word_bits = 6 - order_;
    while (run.count > 0) {
        const std::uint64_t block = table_[run.first / per_block_];
        const std::uint64_t index = run.first % per_block_;
        const HostOffset at{block + (index >> per_word_bits) * 8};
        const std::uint64_t inner = index & low_bits(per_word_bits);
        std::array<std::uint64_t, max_words> buffer;
        const std::uint64_t in_block = std::min(run.count, per_block_ - index);
        const std::uint64_t wanted = divide_up(inner + in_block, bit(per_word_bits));
        const auto loaded =
            TRY(metadata_.words().load(at, std::span(buffer).first(std::min<std::uint64_t>(wanted, max_words))));
        const std::uint64_t count = std::min(in_block, (loaded << per_word_bits) - inner);
        TRY_VOID(visit(std::span(buffer).first(loaded), at, inner, ClusterRun{run.first, count}));
        run.first += count;
        run.count -= count;
    }
    return {};
}

Result<void> Refcounts::load_run(ClusterRun run, std::span<std::uint64_t> counts) const {
    for (std::uint64_t i = 0; i < run.count;) {
        const ClusterRun in_block{run.first + i, std::min(run.count - i, per_block_ - (run.first + i) % per_block_)};
        const auto part_of_block = counts.subspan(i, in_block.count);
        i += in_block.count;
        if (!is_covered(in_block.first)) {
            std::ranges::fill(part_of_block, 0);
            continue;
        }
        TRY_VOID(each_span(
            in_block,
            [&](std::span<const std::uint64_t> words, HostOffset, std::uint64_t inner,
                ClusterRun part) -> Result<void> {
                for (std::uint64_t k = 0; k < part.count; ++k) {
                    part_of_block[part.first - in_block.first + k] =
                        format::refcount_in(words[(inner + k) >> (6 - order_)], inner + k, order_);
                }
                return {};
            }));
    }
    return {};
}

Result<Refcounts::Leading> Refcounts::leading(ClusterRun run) const {
    std::array<std::uint64_t, max_words> counts;
    run.count = std::min<std::uint64_t>(run.count, counts.size());
    TRY_VOID(load_run(run, counts));
    Leading found{1, counts[0] == 1};
    while (found.count < run.count && (counts[found.count] == 1) == found.is_one) ++found.count;
    return found;
}

std::string Refcounts::place_of(std::uint64_t cluster) const {
    return fmt::format("{}: refcount of the cluster at host offset {:#x}", metadata_.file().name(),
                       cluster << cluster_bits_);
}

std::unexpected<Error> Refcounts::too_large(std::uint64_t cluster) const {
    return fail(
        Errc::limit_exceeded, place_of(cluster),
        fmt::format("{} bits cannot count further than {}; qcow amend -o refcount_bits={} IMAGE makes room for more",
                    1U << order_, format::max_refcount(order_), std::max(16U, 2U << order_)));
}

/// Gives the words that count the clusters of the run, all of which have blocks, space in the file.
Result<void> Refcounts::reserve_space(ClusterRun run) {
    const unsigned per_word_bits = 6 - order_;
    while (run.count > 0) {
        const std::uint64_t index = run.first % per_block_;
        const std::uint64_t count = std::min(run.count, per_block_ - index);
        const std::uint64_t begin = index >> per_word_bits;
        const std::uint64_t end = ((index + count - 1) >> per_word_bits) + 1;
        TRY_VOID(metadata_.words().reserve_space({table_[run.first / per_block_] + begin * 8}, (end - begin) * 8));
        run.first += count;
        run.count -= count;
    }
    return {};
}

Result<void> Refcounts::add(ClusterRun run, std::int64_t delta) {
    const std::uint64_t amount = delta < 0 ? static_cast<std::uint64_t>(-delta) : static_cast<std::uint64_t>(delta);
    const auto changed = [&](std::uint64_t value) { return delta < 0 ? value - amount : value + amount; };
    const auto verify = [&](std::span<std::uint64_t> words, HostOffset, std::uint64_t inner,
                            ClusterRun part) -> Result<void> {
        for (std::uint64_t i = 0; i < part.count; ++i) {
            const auto value = format::refcount_in(words[(inner + i) >> (6 - order_)], inner + i, order_);
            if (delta < 0 && value < amount)
                return fail(Errc::corrupt, place_of(part.first + i), "it would fall below 0");
            if (delta > 0 && amount > format::max_refcount(order_) - value) return too_large(part.first + i);
        }
        return {};
    };
    for (std::uint64_t cluster = run.first; cluster < run.end(); cluster = (cluster / per_block_ + 1) * per_block_) {
        if (!has_block(cluster / per_block_))
            return fail(Errc::corrupt, place_of(cluster), "there is no refcount block for it");
    }
    TRY_VOID(reserve_space(run));
    TRY_VOID(each_span(run, verify));
    return each_span(run, [&](std::span<std::uint64_t> words, HostOffset at, std::uint64_t inner, ClusterRun part) {
        for (std::uint64_t i = 0; i < part.count; ++i) {
            auto& word = words[(inner + i) >> (6 - order_)];
            word =
                format::with_refcount(word, inner + i, order_, changed(format::refcount_in(word, inner + i, order_)));
        }
        return write_back_.store(at, words, refcount_pages);
    });
}

Result<void> Refcounts::set(std::uint64_t cluster, std::uint64_t count) {
    if (count > format::max_refcount(order_)) return too_large(cluster);
    return each_span({cluster, 1}, [&](std::span<std::uint64_t> words, HostOffset at, std::uint64_t inner, ClusterRun) {
        words[0] = format::with_refcount(words[0], inner, order_, count);
        return write_back_.store(at, words, refcount_pages);
    });
}

Result<ClusterRun> Refcounts::find_free(std::uint64_t from, std::uint64_t end, std::uint64_t most) const {
    ClusterRun found;
    bool complete = false;
    while (from < end && !complete) {
        const std::uint64_t block_end = std::min(end, (from / per_block_ + 1) * per_block_);
        if (!has_block(from / per_block_)) {
            if (found.count == 0) found.first = from;
            found.count += block_end - from;
            complete = found.count >= most;
            from = block_end;
            continue;
        }
        TRY_VOID(each_span(
            {from, block_end - from},
            [&](std::span<std::uint64_t> words, HostOffset, std::uint64_t inner, ClusterRun part) -> Result<void> {
                for (std::uint64_t i = 0; i < part.count && !complete; ++i) {
                    const bool free = format::refcount_in(words[(inner + i) >> (6 - order_)], inner + i, order_) == 0;
                    if (free && found.count++ == 0) found.first = part.first + i;
                    complete = found.count != 0 && (!free || found.count >= most);
                }
                return {};
            }));
        from = block_end;
    }
    found.count = std::min(found.count, most);
    return found;
}

// Large blocks with small refcounts stand for millions of clusters, and a block that is a hole costs its image nothing.
// So the search for what is counted passes over words that are zero as they are, and over holes.

/// Whether the block of this entry is nothing but a hole.
Result<bool> Refcounts::is_hole(std::uint64_t index) const {
    const auto stored = TRY(metadata_.file().run({table_[index]}, bit(cluster_bits_)));
    return !stored.data && stored.length == bit(cluster_bits_);
}

/// Calls `visit` with each cluster of [first, end), all of one block, whose refcount is not 0.
template <class Visit>
Result<void> Refcounts::each_counted(std::uint64_t first, std::uint64_t end, Visit&& visit) const {
    const std::uint64_t per_word = bit(6 - order_);
    return each_span(
        {first, end - first},
        [&](std::span<std::uint64_t> words, HostOffset, std::uint64_t inner, ClusterRun part) -> Result<void> {
            for (std::uint64_t i = inner; i < inner + part.count;) {
                const std::uint64_t word_end = std::min(inner + part.count, align_down(i, per_word) + per_word);
                const auto word = words[i / per_word];
                for (; word != 0 && i < word_end; ++i) {
                    if (format::refcount_in(word, i, order_) != 0) visit(part.first + i - inner);
                }
                i = word_end;
            }
            return {};
        });
}

Result<std::uint64_t> Refcounts::next_counted(std::uint64_t from, std::uint64_t end) const {
    const std::uint64_t page = max_words * bit(6 - order_);
    while (from < end && from / per_block_ < table_.size()) {
        const std::uint64_t block_end = std::min(end, (from / per_block_ + 1) * per_block_);
        if (!has_block(from / per_block_) || TRY(is_hole(from / per_block_))) {
            from = block_end;
            continue;
        }
        while (from < block_end) {
            const std::uint64_t page_end = std::min(block_end, align_down(from, page) + page);
            std::uint64_t found = end;
            TRY_VOID(each_counted(from, page_end, [&](std::uint64_t cluster) { found = std::min(found, cluster); }));
            if (found != end) return found;
            from = page_end;
        }
    }
    return end;
}

Result<std::uint64_t> Refcounts::counted_end(std::uint64_t from) const {
    std::uint64_t end = from;
    for (std::uint64_t index = table_.size(); end == from && index-- > from / per_block_;) {
        if (!has_block(index) || TRY(is_hole(index))) continue;
        TRY_VOID(each_counted(
            std::max(from, index * per_block_), (index + 1) * per_block_,
            [&](std::uint64_t cluster) { end = cluster + 1; }));
    }
    return end;
}

/// What is needed for `count` clusters behind the growth itself, which is at `first`, and for those of `clusters`.
Refcounts::Growth Refcounts::plan_growth(std::uint64_t first, std::uint64_t count,
                                         std::span<const std::uint64_t> clusters) const {
    Growth growth;
    growth.first = first;
    const std::uint64_t entries_per_cluster = bit(cluster_bits_ - 3);
    // What is added must be counted itself, which may take more: until it no longer does.
    for (;;) {
        const std::uint64_t end = growth.run().end() + count;
        std::set<std::uint64_t> blocks;
        const auto need = [&](std::uint64_t index) {
            if (!has_block(index)) blocks.insert(index);
        };
        for (const auto cluster : clusters) need(cluster / per_block_);
        for (std::uint64_t index = first / per_block_; index * per_block_ < end; ++index) need(index);
        const std::uint64_t entries = blocks.empty() ? 0 : *blocks.rbegin() + 1;
        // Half as large again, so that a growing image does this seldom.
        const std::uint64_t table_clusters =
            entries <= table_.size() ? 0 : divide_up(std::max(entries, table_.size() * 3 / 2), entries_per_cluster);
        const bool stable = blocks.size() == growth.blocks.size() && table_clusters == growth.table_clusters;
        growth.blocks.assign(blocks.begin(), blocks.end());
        growth.table_clusters = table_clusters;
        // What is beyond the limit is refused, and need not be planned further: a file may be that long by its holes.
        if (stable || table_clusters << cluster_bits_ > format::max_refcount_table_bytes) return growth;
    }
}

Result<std::uint64_t> Refcounts::cover(std::uint64_t first, std::uint64_t count) {
    return carry_out(plan_growth(first, count), count);
}

Result<void> Refcounts::add_blocks_for(std::span<const std::uint64_t> clusters, std::uint64_t tail) {
    TRY(carry_out(plan_growth(tail, 0, clusters), 0));
    return {};
}

Result<std::uint64_t> Refcounts::carry_out(const Growth& growth, std::uint64_t count) {
    if (growth.run().end() + count > format::max_host_offset >> cluster_bits_ ||
        growth.table_clusters << cluster_bits_ > format::max_refcount_table_bytes) {
        return fail(Errc::no_space, metadata_.file().name(),
                    "the file cannot grow further in this format; convert to an image with larger clusters");
    }
    if (growth.run().count != 0) TRY_VOID(grow(growth));
    return growth.run().count;
}

Result<void> Refcounts::grow(const Growth& growth) {
    const HostOffset at{growth.first << cluster_bits_};
    const std::uint64_t bytes = growth.run().count << cluster_bits_;
    if (const auto used = map_.find(at, bytes); !used.empty()) {
        return write_back_.declare_corrupt(fmt::format("host offset {:#x}", at.value),
                                           fmt::format("{} lies in clusters with refcount 0", used));
    }
    const std::uint64_t old_entries = table_.size();
    const HostOffset old_table = metadata_.state().refcount_table;
    TRY_VOID(make_zeros(metadata_.file(), at, bytes));
    metadata_.words().forget(at, bytes);
    // What is going to be written has space in the file before anything depends on it.
    TRY_VOID(metadata_.file().allocate(at, bytes));
    if (growth.table_clusters == 0) {
        const std::uint64_t first = growth.blocks.front();
        TRY_VOID(metadata_.file().allocate(old_table + first * 8, (growth.blocks.back() - first + 1) * 8));
    } else {
        // The old table is going to be counted down.
        const ClusterRun table{old_table.value >> cluster_bits_, metadata_.state().refcount_table_clusters};
        TRY_VOID(reserve_space(table));
    }
    if (growth.table_clusters != 0) table_.resize((growth.table_clusters << cluster_bits_) / 8);
    for (std::size_t i = 0; i < growth.blocks.size(); ++i) table_[growth.blocks[i]] = at.value + (i << cluster_bits_);

    const HostOffset table_at = at + (growth.blocks.size() << cluster_bits_);
    bool counted = false;
    const auto attempt = [&]() -> Result<void> {
        TRY_VOID(add(growth.run(), 1));
        counted = true;
        TRY_VOID(write_back_.write_refcounts());
        if (growth.table_clusters != 0) TRY_VOID(metadata_.file().write(table_at, encode_table(0, table_.size())));
        return write_back_.sync();  // before anything names them
    };
    if (auto done = attempt(); !done) {
        for (const auto index : growth.blocks) table_[index] = 0;
        table_.resize(old_entries);
        metadata_.words().forget(at, bytes);
        for (std::uint64_t cluster = growth.first; counted && cluster < growth.run().end(); ++cluster) {
            // Older blocks count them, too. If even that fails, they are leaked.
            if (is_covered(cluster)) static_cast<void>(add({cluster, 1}, -1));
        }
        return done;
    }
    TRY_VOID(map_.add(at, growth.blocks.size() << cluster_bits_, MetadataMap::Kind::refcount_block));
    if (growth.table_clusters != 0) return replace_table(table_at, growth.table_clusters);
    for (const auto index : growth.blocks) unwritten_.insert(index);
    return write_table();
}

std::vector<std::byte> Refcounts::encode_table(std::uint64_t first, std::uint64_t count) const {
    std::vector<std::byte> bytes(count * 8);
    for (std::uint64_t i = 0; i < count; ++i) store_be(bytes, i * 8, table_[first + i]);
    return bytes;
}

Result<void> Refcounts::write_table() {
    // Blocks lie where they themselves, or others before them in the table, count them. So the table is written from
    // front to back, and what reaches the disk at once is a sector.
    while (!unwritten_.empty()) {
        const std::uint64_t first = *unwritten_.begin();
        const auto behind = unwritten_.lower_bound(align_down(first, sector_entries) + sector_entries);
        const auto bytes = encode_table(first, *std::prev(behind) - first + 1);
        TRY_VOID(metadata_.file().write(metadata_.state().refcount_table + first * 8, bytes));
        unwritten_.erase(unwritten_.begin(), behind);
        if (!unwritten_.empty()) TRY_VOID(write_back_.sync());
    }
    return {};
}

/// The whole table is durable at its new place.
Result<void> Refcounts::replace_table(HostOffset at, std::uint64_t clusters) {
    const auto old = metadata_.state();
    TRY_VOID(map_.add(at, clusters << cluster_bits_, MetadataMap::Kind::refcount_table));
    auto named = write_back_.update_header([&](format::HeaderState& header) {
        header.refcount_table = at;
        header.refcount_table_clusters = static_cast<std::uint32_t>(clusters);
    });
    if (named) named = write_back_.sync();  // before the old one may be used for anything else
    // Which of the two the file names can no longer be told.
    if (!named) return write_back_.stop(std::move(named).error());
    unwritten_.clear();
    const std::uint64_t old_bytes = std::uint64_t{old.refcount_table_clusters} << cluster_bits_;
    map_.remove(old.refcount_table, old_bytes);
    metadata_.words().forget(old.refcount_table, old_bytes);
    return add({old.refcount_table.value >> cluster_bits_, old.refcount_table_clusters}, -1);
}

}  // namespace qcow::qcow2
