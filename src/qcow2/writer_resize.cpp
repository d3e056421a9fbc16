// The writer's changes of the virtual size, and of the L1 table with it.

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "base/try.h"
#include "qcow2/tables.h"
#include "qcow2/writer.h"

namespace qcow::qcow2 {

using format::L2Entry;

Result<void> Writer::resize(std::uint64_t size) {
    const std::lock_guard lock(resize_mutex_);
    const auto header = core_->current_header();
    const auto refuse = [&](std::string what) { return fail(Errc::unsupported, core_->file->name(), std::move(what)); };
    if (core_->header.version < 3 && header.snapshot_count != 0)
        return refuse("it has snapshots, and version 2 cannot record that theirs is another size; use version 3");
    const std::uint64_t most = (format::max_l1_bytes / 8) * rules_.geometry.l2_coverage();
    if (size > most || size > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
        return fail(Errc::invalid_argument, core_->file->name(),
                    fmt::format("{} bytes are more than clusters of {} can map", size, core_->header.cluster_size()));
    }
    if (size == header.size) return {};
    return write_back_.attempt([&]() -> Result<void> {
        TRY_VOID(begin_writing({0}, 0));
        TRY_VOID(bitmaps_.begin_resize(size));
        auto resized = size > header.size ? grow(header.size, size) : shrink(size);
        auto bitmaps = core_->current_header().size == size ? bitmaps_.finish_resize(size) : bitmaps_.cancel_resize();
        return resized ? bitmaps : resized;
    });
}

Result<void> Writer::set_header_size(std::uint64_t size) {
    TRY_VOID(write_back_.update_header([&](format::HeaderState& header) { header.size = size; }));
    return write_back_.sync();
}

Result<void> Writer::grow(std::uint64_t old_size, std::uint64_t size) {
    const std::uint64_t old_tables_end = core_->current_header().l1_entries * rules_.geometry.l2_coverage();
    TRY_VOID(grow_l1(divide_up(size, rules_.geometry.l2_coverage())));
    if (rules_.external_data) TRY_VOID(core_->data->resize(size));
    size_ = size;
    auto zeroed = [&]() -> Result<void> {
        const auto& backing = core_->below.image();
        const bool shines_through = core_->below.exists() && !(backing && backing->size() <= old_size);
        if (shines_through || raw_data_) {
            TRY_VOID(zero_range({old_size}, size - old_size, Zeroing::release));
        } else {
            // What the last cluster has behind the old end was nobody's, nor what tables have there: another program
            // may have left entries behind a smaller size. The rest is not recorded, or a large disk would take space.
            const std::uint64_t cluster_end = rules_.geometry.clusters(old_size) << cluster_bits_;
            const std::uint64_t end = std::min(size, std::max(cluster_end, old_tables_end));
            TRY_VOID(zero_range({old_size}, end - old_size, Zeroing::forget));
        }
        return flush();
    }();
    if (zeroed) zeroed = set_header_size(size);
    if (!zeroed) size_ = old_size;
    return zeroed;
}

Result<void> Writer::shrink(std::uint64_t size) {
    const std::uint64_t old_size = size_.exchange(size);
    if (auto named = set_header_size(size); !named) {
        size_ = old_size;
        return named;
    }
    // The header is durable: what it no longer covers can go.
    shrunk_ = true;
    const std::uint64_t end = rules_.geometry.clusters(old_size);
    for (std::uint64_t first = rules_.geometry.clusters(size); first < end;) {
        std::uint64_t last = std::min(end, l2_end(cluster_at(first)));
        if (rules_.geometry.l2_index(cluster_at(first)) == 0) {
            TRY_VOID(drop_l2_table(cluster_at(first)));
        } else if (TRY(l1_entry(cluster_at(first))).allocated()) {
            last = std::min(last, page_end(cluster_at(first)));
            const RangeLocks::Guard guard(clusters_, first, last);
            const auto old = TRY(load_entries({first, last}));
            TRY_VOID(store_entries(first, std::vector<L2Entry>(old.size()), false));
            retire(old);
        }
        first = last;
        TRY_VOID(flush_if_full());
    }
    if (rules_.external_data) TRY_VOID(core_->data->resize(size));
    return flush();
}

/// Gives up the table that maps from here on, with all that it leads to.
Result<void> Writer::drop_l2_table(GuestOffset at) {
    const std::uint64_t first = at.value >> cluster_bits_;
    const RangeLocks::Guard guard(clusters_, first, l2_end(at));
    const std::lock_guard lock(l2_locks_[rules_.geometry.l1_index(at) % l2_locks_.size()]);
    const auto l1 = TRY(l1_entry(at));
    if (!l1.allocated()) return {};
    const auto old = TRY(load_entries({first, l2_end(at)}));
    constexpr std::uint64_t none = 0;
    TRY_VOID(write_back_.store(active_.mapping().l1_entry_at(at), {&none, 1}, WordCache::PageClass::mapping));
    retire(old);
    allocator_.retire_table(l1.l2_table(), bit(cluster_bits_));
    return {};
}

/// Moves the L1 table to where it has room for so many entries.
Result<void> Writer::grow_l1(std::uint64_t entries) {
    const auto header = core_->current_header();
    if (entries <= header.l1_entries) return {};
    const std::uint64_t bytes = divide_up(entries * 8, bit(cluster_bits_)) << cluster_bits_;
    const auto run = TRY(allocator_.take_contiguous(bytes >> cluster_bits_));
    const HostOffset table{run.first << cluster_bits_};
    auto moved = [&]() -> Result<void> {
        TRY_VOID(metadata_.add(table, bytes, MetadataMap::Kind::l1_table));
        return move_l1(table, static_cast<std::uint32_t>(entries));
    }();
    if (!moved) {
        allocator_.retire_table(table, bytes);
        return moved;
    }
    if (header.l1_entries != 0) allocator_.retire_table(header.l1_table, std::uint64_t{header.l1_entries} * 8);
    return {};
}

/// To whole clusters that are its own from now on.
Result<void> Writer::move_l1(HostOffset table, std::uint32_t entries) {
    const auto header = core_->current_header();
    const std::uint64_t bytes = divide_up(std::uint64_t{entries} * 8, bit(cluster_bits_)) << cluster_bits_;
    // Nobody may change an entry of the old table while it moves.
    std::vector<std::unique_lock<std::mutex>> locks;
    locks.reserve(l2_locks_.size());
    for (auto& lock : l2_locks_) locks.emplace_back(lock);
    core_->words.forget(table, bytes);
    TRY_VOID(core_->file->write(table, TRY(copy_words(*core_, header.l1_table, header.l1_entries, bytes))));
    // Entries that were only in the cache may refer to tables that had to be written first.
    TRY_VOID(write_back_.write_all());
    TRY_VOID(write_back_.sync());
    TRY_VOID(write_back_.update_header([&](format::HeaderState& changed) {
        changed.l1_table = table;
        changed.l1_entries = entries;
    }));
    TRY_VOID(write_back_.sync());
    active_.mapping().move_l1(table);
    return {};
}

}  // namespace qcow::qcow2
