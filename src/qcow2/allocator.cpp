#include "qcow2/allocator.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/try.h"

namespace qcow::qcow2 {
namespace {

constexpr std::uint64_t first_reservation_bytes = 1 * MiB;
constexpr std::uint64_t max_reservation_bytes = 64 * MiB;
constexpr std::uint64_t min_reservation_clusters = 4;
constexpr std::uint64_t search_window = std::uint64_t{1} << 18;  // clusters whose refcounts are looked at in one go
constexpr std::size_t max_runs = 256;  // in one reservation, where free clusters lie scattered

}  // namespace

Result<void> Allocator::load() {
    const std::lock_guard lock(mutex_);
    next_reservation_ = std::max(first_reservation_bytes >> cluster_bits_, min_reservation_clusters);
    TRY_VOID(refcounts_.load());
    return find_counted_end();
}

Result<void> Allocator::find_counted_end() {
    counted_end_ = 0;
    counted_end_ = TRY(refcounts_.counted_end(TRY(tail())));
    return {};
}

/// Where the file goes on.
Result<std::uint64_t> Allocator::tail() const {
    return std::max(counted_end_, divide_up(TRY(core_.file->size()), bit(cluster_bits_)));
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

/// Counts the runs, makes them zeros, and makes that durable.
Result<void> Allocator::commit_reservation(std::vector<ClusterRun> runs) {
    std::size_t counted = 0;
    const auto attempt = [&]() -> Result<void> {
        TRY_VOID(refcounts_.write_table());
        for (const auto& run : runs) {
            const HostOffset at{run.first << cluster_bits_};
            const std::uint64_t bytes = run.count << cluster_bits_;
            if (const auto used = metadata_.find(at, bytes); !used.empty()) {
                return write_back_.declare_corrupt(fmt::format("host offset {:#x}", at.value),
                                                   fmt::format("{} lies in clusters with refcount 0", used));
            }
            TRY_VOID(make_zeros(*core_.file, at, bytes));
        }
        for (const auto& run : runs) {
            TRY_VOID(refcounts_.add(run, 1));
            ++counted;
        }
        TRY_VOID(write_back_.write_refcounts());
        return write_back_.sync();
    };
    auto done = attempt();
    if (done) {
        reserved_.insert(reserved_.end(), runs.begin(), runs.end());
        return done;
    }
    for (std::size_t i = 0; i < runs.size(); ++i) {
        search_from_ = std::min(search_from_, runs[i].first);
        // If even that fails, they are leaked.
        if (i < counted) static_cast<void>(refcounts_.add(runs[i], -1));
    }
    return done;
}

Result<void> Allocator::reserve() {
    auto done = [&]() -> Result<void> { return commit_reservation(TRY(find_runs(next_reservation_))); }();
    if (!done && done.error().code == Errc::no_space) {
        // The last of the space, cluster by cluster.
        next_reservation_ = 1;
        return commit_reservation(TRY(find_runs(next_reservation_)));
    }
    // A crash leaks what is reserved: not much more than the disk is worth.
    const std::uint64_t worth =
        std::clamp(core_.current_header().size / 16, first_reservation_bytes, max_reservation_bytes);
    const std::uint64_t most = std::max(worth >> cluster_bits_, 4 * min_reservation_clusters);
    if (done) next_reservation_ = std::min(next_reservation_ * 2, most);
    return done;
}

Result<ClusterRun> Allocator::take(std::uint64_t wanted) {
    const std::lock_guard lock(mutex_);
    if (reserved_.empty()) TRY_VOID(reserve());
    auto& front = reserved_.front();
    const ClusterRun taken{front.first, std::min(wanted, front.count)};
    front.first += taken.count;
    front.count -= taken.count;
    if (front.count == 0) reserved_.pop_front();
    return taken;
}

Result<ClusterRun> Allocator::take_contiguous(std::uint64_t count) {
    const std::lock_guard lock(mutex_);
    const std::uint64_t end = TRY(tail());
    const ClusterRun run{end + TRY(refcounts_.cover(end, count)), count};
    TRY_VOID(commit_reservation({run}));
    reserved_.pop_back();
    return run;
}

Result<HostOffset> Allocator::take_bytes(std::uint64_t length) {
    const std::uint64_t cluster_size = bit(cluster_bits_);
    {
        const std::lock_guard lock(mutex_);
        const std::uint64_t room = stream_end_.value == 0 ? 0 : cluster_size - stream_end_.value % cluster_size;
        const std::uint64_t shared = stream_end_.value >> cluster_bits_;
        if (stream_end_.value % cluster_size != 0) {
            // One more in the cluster that has the end of the previous stream, and on into the next one if that is the
            // next of the reservation.
            const bool spills = length > room;
            const bool goes_on = !reserved_.empty() && reserved_.front().first == shared + 1;
            if ((!spills || goes_on) && TRY(refcounts_.get(shared)) < format::max_refcount(refcounts_.order())) {
                TRY_VOID(refcounts_.add({shared, 1}, 1));
                const HostOffset at = stream_end_;
                if (spills) {
                    auto& front = reserved_.front();
                    ++front.first;
                    if (--front.count == 0) reserved_.pop_front();
                }
                stream_end_ += length;
                return at;
            }
        }
    }
    const auto fresh = TRY(take(1));
    const std::lock_guard lock(mutex_);
    const HostOffset at{fresh.first << cluster_bits_};
    stream_end_ = at + length;
    return at;
}

void Allocator::add_retired(ClusterRun run, bool table) {
    const std::lock_guard lock(retired_mutex_);
    retired_.push_back({run, epochs_.now(), table});
    retired_clusters_.fetch_add(run.count, std::memory_order_relaxed);
}

void Allocator::retire(ClusterRun run) { add_retired(run, false); }

void Allocator::retire_stream(const format::CompressedRange& range) {
    const std::uint64_t first = range.offset.value >> cluster_bits_;
    add_retired({first, ((range.offset.value + range.length - 1) >> cluster_bits_) - first + 1}, false);
}

void Allocator::retire_table(HostOffset at, std::uint64_t length) {
    // It is metadata until nothing on disk leads there any more: see release().
    add_retired({at.value >> cluster_bits_, divide_up(length, bit(cluster_bits_))}, true);
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
    const std::vector<RetiredRun> passed(rest.begin(), rest.end());
    durable_.erase(rest.begin(), rest.end());
    for (const auto& run : passed) TRY_VOID(release(run));
    return {};
}

Result<void> Allocator::release(const RetiredRun& retired) {
    const auto& run = retired.run;
    const HostOffset at{run.first << cluster_bits_};
    if (retired.table) metadata_.remove(at, run.count << cluster_bits_);
    // Anything else that is metadata was never the guest's to give up.
    if (const auto used = metadata_.find(at, run.count << cluster_bits_); !used.empty()) {
        return write_back_.declare_corrupt(fmt::format("host offset {:#x}", at.value),
                                           fmt::format("{} would be freed with guest data", used));
    }
    if (retired.table) core_.words.forget(at, run.count << cluster_bits_);
    for (std::uint64_t cluster = run.first; cluster < run.end();) {
        ClusterRun last;  // with their last reference
        {
            const std::lock_guard lock(mutex_);
            for (; cluster < run.end(); ++cluster) {
                const bool takes_streams =
                    stream_end_.value % bit(cluster_bits_) != 0 && stream_end_.value >> cluster_bits_ == cluster;
                // One that is not counted is not punched: it may be somebody else's. Lowering it fails.
                if (TRY(refcounts_.get(cluster)) != 1) {
                    if (last.count != 0) break;
                    TRY_VOID(refcounts_.add({cluster, 1}, -1));
                    continue;
                }
                if (takes_streams) stream_end_ = {};
                if (last.count++ == 0) last.first = cluster;
            }
        }
        if (last.count == 0) continue;
        // Still counted, so nobody is given them. That they cannot be punched does not keep them from being used again.
        if (punch_)
            static_cast<void>(core_.file->write_zeroes({last.first << cluster_bits_}, last.count << cluster_bits_));
        const std::lock_guard lock(mutex_);
        TRY_VOID(refcounts_.add(last, -1));
        search_from_ = std::min(search_from_, last.first);
    }
    return {};
}

Result<void> Allocator::give_back() {
    const std::lock_guard lock(mutex_);
    std::uint64_t end = divide_up(TRY(core_.file->size()), bit(cluster_bits_));
    const std::uint64_t before = end;
    std::ranges::sort(reserved_, {}, &ClusterRun::first);
    while (!reserved_.empty()) {
        const auto run = reserved_.back();
        TRY_VOID(refcounts_.add(run, -1));
        reserved_.pop_back();
        search_from_ = std::min(search_from_, run.first);
        if (run.end() == end) end = run.first;
    }
    stream_end_ = {};
    TRY_VOID(write_back_.write_refcounts());
    TRY_VOID(write_back_.sync());
    return end == before ? Result<void>() : core_.file->resize(end << cluster_bits_);
}

}  // namespace qcow::qcow2
