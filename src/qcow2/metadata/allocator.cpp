#include "qcow2/metadata/allocator.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "base/try.h"

namespace qcow::qcow2 {
namespace {

constexpr std::uint64_t max_queue_bytes = 4 * MiB;               // for tables, or compressed streams
constexpr std::uint64_t growth = 4;                              // from one reservation to the next
constexpr std::uint64_t search_window = std::uint64_t{1} << 18;  // clusters whose refcounts are looked at in one go
constexpr std::uint64_t young_window = 4;                        // times what a request wants
constexpr std::size_t max_runs = 256;  // in one reservation, where free clusters lie scattered

/// Joins runs that lie one behind the other: giving a long run back to the file system takes one call.
std::vector<Allocator::RetiredRun> joined(std::span<Allocator::RetiredRun> runs) {
    std::ranges::sort(runs, {}, [](const auto& retired) { return std::pair(retired.table, retired.run.first); });
    std::vector<Allocator::RetiredRun> result;
    for (const auto& retired : runs) {
        if (!result.empty() && result.back().table == retired.table && result.back().run.end() == retired.run.first) {
            result.back().run.count += retired.run.count;
        } else {
            result.push_back(retired);
        }
    }
    return result;
}

}  // namespace

Result<void> Allocator::load() {
    const std::lock_guard lock(mutex_);
    TRY_VOID(refcounts_.load());
    TRY_VOID(find_counted_end());
    const std::uint64_t end = divide_up(TRY(metadata_.file().size()), bit(cluster_bits_));
    least_end_ = end != 0 && TRY(refcounts_.get(end - 1)) == 0 ? end : 0;
    return {};
}

Result<void> Allocator::find_counted_end() {
    counted_end_ = 0;
    counted_end_ = TRY(refcounts_.counted_end(TRY(tail())));
    return {};
}

/// Where the file goes on.
Result<std::uint64_t> Allocator::tail() const {
    return std::max(counted_end_, divide_up(TRY(metadata_.file().size()), bit(cluster_bits_)));
}

/// Free clusters, `wanted` at most: within the file if there are any, else behind its end.
Result<std::vector<ClusterRun>> Allocator::find_runs(std::uint64_t wanted) {
    std::vector<ClusterRun> runs;
    const std::uint64_t end = TRY(tail());
    std::uint64_t found = 0;
    while (search_from_ < end && found < wanted && runs.size() < max_runs) {
        const std::uint64_t window = std::min(end, search_from_ + search_window);
        auto run = TRY(refcounts_.find_free(search_from_, window, wanted - found));
        if (run.count == 0) {
            search_from_ = window;
            if (found != 0) break;  // enough for now; the search goes on next time
            continue;
        }
        // Clusters without blocks have to be given some first; those may take all of a short run.
        const std::uint64_t taken = TRY(refcounts_.cover(run.first, 1));
        if (taken == 0) {
            // Past the last block within the run there may be none again.
            const std::uint64_t per_block = format::refcounts_per_block(cluster_bits_, refcounts_.order());
            run.count = std::min(run.count, per_block - run.first % per_block);
            runs.push_back(run);
            found += run.count;
        }
        search_from_ = taken == 0 ? run.end() : run.first + taken;
    }
    if (!runs.empty()) return runs;
    const std::uint64_t behind = TRY(tail());  // and behind what covering has added
    const std::uint64_t first = behind + TRY(refcounts_.cover(behind, wanted));
    search_from_ = first + wanted;
    runs.push_back({first, wanted});
    return runs;
}

/// Counts the runs, makes them zeros, and makes that durable: all of them, or none if it fails.
Result<void> Allocator::count_and_zero(std::span<const ClusterRun> runs) {
    std::size_t counted = 0;
    const auto attempt = [&]() -> Result<void> {
        TRY_VOID(refcounts_.write_table());
        for (const auto& run : runs) {
            const HostOffset at{run.first << cluster_bits_};
            const std::uint64_t bytes = run.count << cluster_bits_;
            if (const auto used = map_.find(at, bytes); !used.empty()) {
                return write_back_.declare_corrupt(fmt::format("host offset {:#x}", at.value),
                                                   fmt::format("{} lies in clusters with refcount 0", used));
            }
            TRY_VOID(make_zeros(metadata_.file(), at, bytes));
        }
        for (const auto& run : runs) {
            TRY_VOID(refcounts_.add(run, 1));
            ++counted;
        }
        TRY_VOID(write_back_.write_refcounts());
        return write_back_.sync();
    };
    auto done = attempt();
    if (done) return done;
    for (std::size_t i = 0; i < runs.size(); ++i) {
        search_from_ = std::min(search_from_, runs[i].first);
        // If even that fails, they are leaked.
        if (i < counted) static_cast<void>(refcounts_.add(runs[i], -1));
    }
    return done;
}

/// Whether nothing is wrong but that there is no space. (A flush that fails for want of it has lost something.)
bool Allocator::lacks_space(const Error& error) const {
    return error.code == Errc::no_space && write_back_.verify_writable();
}

/// `wanted` clusters, or fewer where they lie scattered or there is no space for all of them.
Result<std::vector<ClusterRun>> Allocator::reserve(std::uint64_t wanted) {
    const auto attempt = [&](std::uint64_t count) -> Result<std::vector<ClusterRun>> {
        auto runs = TRY(find_runs(count));
        TRY_VOID(count_and_zero(runs));
        return runs;
    };
    auto runs = attempt(wanted);
    // The last of the space, cluster by cluster.
    if (!runs && lacks_space(runs.error()) && wanted > 1) return attempt(1);
    return runs;
}

/// Makes a reservation that has a place for the guest cluster, and takes it.
Result<ClusterRun> Allocator::reserve_for(std::uint64_t guest, std::uint64_t wanted) {
    const std::uint64_t size = metadata_.state().size;
    auto window = data_.next_window(guest, wanted, divide_up(size, bit(cluster_bits_)));
    std::uint64_t count = 0;
    // A guest that writes here and there leaves most of its windows free. What is left of them comes first.
    if (!window || window->count <= young_window * wanted) {
        if (const auto spare = data_.take_spare(guest, wanted)) return *spare;
    }
    if (window) {
        count = window->count;
    } else {
        const std::uint64_t most = std::clamp(size / 16, 1 * MiB, max_window_bytes) >> cluster_bits_;
        count = std::max(wanted, next_spare_);
        next_spare_ = std::min(next_spare_ * 2, std::max(most, min_reserved_clusters));
        window = {guest, wanted};
    }
    const auto runs = reserve(count);
    if (!runs) {
        // What is left of others does as well.
        if (!lacks_space(runs.error())) return std::unexpected(runs.error());
        auto left = data_.take_spare(guest, 1);
        if (!left) left = data_.take_any();
        if (!left) return std::unexpected(runs.error());
        return *left;
    }
    std::uint64_t reserved = 0;
    for (const auto& run : *runs) reserved += run.count;
    if (reserved < count) window = {guest, reserved};
    data_.add(*window, *runs);
    if (const auto taken = data_.take_for(guest, wanted)) return *taken;
    return data_.take_spare(guest, 1).value();  // another one has taken its place in the window
}

Result<ClusterRun> Allocator::take(std::uint64_t guest, std::uint64_t wanted) {
    const std::lock_guard lock(mutex_);
    if (const auto taken = data_.take_for(guest, wanted)) return *taken;
    return reserve_for(guest, wanted);
}

/// Sees to it that the queue has a cluster.
Result<void> Allocator::refill(Queue& queue) {
    if (!queue.runs.empty()) return {};
    const auto runs = TRY(reserve(queue.next));
    queue.runs.assign(runs.begin(), runs.end());
    queue.next = std::min(queue.next * growth, std::max(max_queue_bytes >> cluster_bits_, min_reserved_clusters));
    return {};
}

std::uint64_t Allocator::take_front(Queue& queue) {
    auto& front = queue.runs.front();
    const std::uint64_t cluster = front.first++;
    if (--front.count == 0) queue.runs.pop_front();
    return cluster;
}

Result<HostOffset> Allocator::take_table() {
    const std::lock_guard lock(mutex_);
    TRY_VOID(refill(tables_));
    return HostOffset{take_front(tables_) << cluster_bits_};
}

Result<ClusterRun> Allocator::take_contiguous(std::uint64_t count) {
    const std::lock_guard lock(mutex_);
    const std::uint64_t end = TRY(tail());
    const ClusterRun run{end + TRY(refcounts_.cover(end, count)), count};
    TRY_VOID(count_and_zero({&run, 1}));
    return run;
}

Result<HostOffset> Allocator::take_bytes(std::uint64_t length) {
    const std::lock_guard lock(mutex_);
    const std::uint64_t used = stream_end_.value & low_bits(cluster_bits_);
    if (used != 0) {
        // One more in the cluster that has the end of the previous stream, and on into the next one if that is the
        // next of the reservation.
        const std::uint64_t shared = stream_end_.value >> cluster_bits_;
        const bool spills = length > bit(cluster_bits_) - used;
        if (spills) TRY_VOID(refill(streams_));
        const bool fits = !spills || streams_.runs.front().first == shared + 1;
        if (fits && TRY(refcounts_.get(shared)) < format::max_refcount(refcounts_.order())) {
            TRY_VOID(refcounts_.add({shared, 1}, 1));
            if (spills) take_front(streams_);
            const HostOffset at = stream_end_;
            stream_end_ += length;
            return at;
        }
    }
    TRY_VOID(refill(streams_));
    const HostOffset at{take_front(streams_) << cluster_bits_};
    stream_end_ = at + length;
    return at;
}

void Allocator::retire(ClusterRun run, bool table) {
    // A table is metadata until nothing on disk leads there any more: see release().
    const std::lock_guard lock(retired_mutex_);
    retired_.push_back({run, epochs_.now(), table});
    retired_clusters_.fetch_add(run.count, std::memory_order_relaxed);
}

Allocator::Retired Allocator::begin_flush() {
    const std::lock_guard lock(retired_mutex_);
    retired_clusters_.store(0, std::memory_order_relaxed);
    return std::exchange(retired_, {});
}

void Allocator::flush_failed(Retired retired) {
    const std::lock_guard lock(retired_mutex_);
    retired_.insert(retired_.end(), retired.begin(), retired.end());
}

Result<void> Allocator::end_flush(Retired retired) {
    const std::lock_guard lock(durable_mutex_);
    durable_.insert(durable_.end(), retired.begin(), retired.end());
    epochs_.advance();
    epochs_.advance();
    auto rest = std::ranges::partition(durable_, [&](const RetiredRun& run) { return !epochs_.passed(run.epoch); });
    const auto passed = joined(rest);
    durable_.erase(rest.begin(), rest.end());
    for (const auto& retired_run : passed) TRY_VOID(release(retired_run.run, retired_run.table));
    return {};
}

Result<void> Allocator::add_references(std::span<const ClusterRun> runs) {
    const std::lock_guard lock(mutex_);
    for (std::size_t i = 0; i < runs.size(); ++i) {
        auto added = refcounts_.add(runs[i], 1);
        if (added) continue;
        // If even that fails, they are leaked.
        while (i-- > 0) static_cast<void>(refcounts_.add(runs[i], -1));
        return added;
    }
    return {};
}

Result<void> Allocator::load_refcounts(ClusterRun run, std::span<std::uint64_t> counts) {
    const std::lock_guard lock(mutex_);
    return refcounts_.load_run(run, counts);
}

void Allocator::wait_for_requests() {
    const std::lock_guard lock(durable_mutex_);
    const auto epoch = epochs_.now();
    while (!epochs_.passed(epoch)) {
        if (!epochs_.advance()) std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
}

Result<void> Allocator::release(ClusterRun run, bool table) {
    // Whatever else is metadata was never the guest's to give up.
    if (!table) {
        const HostOffset at{run.first << cluster_bits_};
        if (const auto used = map_.find(at, run.count << cluster_bits_); !used.empty()) {
            return write_back_.declare_corrupt(fmt::format("host offset {:#x}", at.value),
                                               fmt::format("{} would be freed with guest data", used));
        }
    }
    while (run.count > 0) {
        ClusterRun part = run;
        {
            const std::lock_guard lock(mutex_);
            const auto [count, is_last] = TRY(refcounts_.leading(run));
            part.count = count;
            run.first += count;
            run.count -= count;
            // One that is not counted is not punched: it may be somebody else's. Lowering it fails.
            if (!is_last) {
                TRY_VOID(refcounts_.add(part, -1));
                continue;
            }
            const std::uint64_t stream = stream_end_.value >> cluster_bits_;
            if (stream >= part.first && stream < part.end()) stream_end_ = {};
        }
        const HostOffset at{part.first << cluster_bits_};
        const std::uint64_t bytes = part.count << cluster_bits_;
        if (table) {
            map_.remove(at, bytes);
            metadata_.words().forget(at, bytes);
        }
        // Still counted, so nobody is given them. That they cannot be punched does not keep them from being used again.
        if (punch_) static_cast<void>(metadata_.file().write_zeroes(at, bytes));
        const std::lock_guard lock(mutex_);
        TRY_VOID(refcounts_.add(part, -1));
        search_from_ = std::min(search_from_, part.first);
    }
    return {};
}

Result<void> Allocator::give_back() {
    const std::lock_guard lock(mutex_);
    // A second call goes on where one that failed has stopped.
    const auto left = data_.take_all();
    left_over_.insert(left_over_.end(), left.begin(), left.end());
    for (auto* queue : {&tables_, &streams_}) {
        left_over_.insert(left_over_.end(), queue->runs.begin(), queue->runs.end());
        queue->runs.clear();
    }
    while (!left_over_.empty()) {
        const auto run = left_over_.back();
        TRY_VOID(refcounts_.add(run, -1));
        left_over_.pop_back();
        search_from_ = std::min(search_from_, run.first);
    }
    stream_end_ = {};
    TRY_VOID(write_back_.write_refcounts());
    TRY_VOID(write_back_.sync());
    return cut_tail();
}

/// Cuts free clusters off the end of the file.
Result<void> Allocator::cut_tail() {
    const std::uint64_t end = divide_up(TRY(metadata_.file().size()), bit(cluster_bits_));
    if (search_from_ >= end) return {};
    const std::uint64_t used = std::max(least_end_, TRY(refcounts_.counted_end(search_from_)));
    return used < end ? metadata_.file().resize(used << cluster_bits_) : Result<void>();
}

}  // namespace qcow::qcow2
