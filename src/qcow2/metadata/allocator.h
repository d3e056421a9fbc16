#pragma once
// Host clusters: handing them out, and taking them back when nothing can depend on them any more.

#include <atomic>
#include <deque>
#include <mutex>
#include <vector>

#include "base/epochs.h"
#include "qcow2/metadata/reservations.h"

namespace qcow::qcow2 {

/// Clusters are reserved in runs: counted, made zeros, and both made durable, before the first of them is handed out.
/// So the mapping may refer to them at any time without a flush of its own, and what a crash leaves is a leak at worst.
/// Reservations begin small and grow with use.
///
/// A cluster that is no longer referred to is retired. It is free again, and may be punched, only once a flush that
/// began after that has made the last change durable, and every request that could still be using it is done.
///
/// Thread-safe.
class Allocator {
public:
    Allocator(Metadata& metadata, WriteBack& write_back, MetadataMap& map, Epochs& epochs, bool punch)
        : metadata_(metadata),
          write_back_(write_back),
          map_(map),
          epochs_(epochs),
          punch_(punch),
          cluster_bits_(metadata.header().cluster_bits),
          refcounts_(metadata, write_back, map),
          data_(std::max(max_window_bytes >> cluster_bits_, min_reserved_clusters)) {}

    /// Reads the refcount table.
    Result<void> load();

    /// Places for the guest clusters from `guest` on: 1 to `wanted` clusters one behind the other. They read as zeros.
    Result<ClusterRun> take(std::uint64_t guest, std::uint64_t wanted);

    /// A cluster for metadata. It reads as zeros.
    Result<HostOffset> take_table();

    /// Exactly `count` of them.
    Result<ClusterRun> take_contiguous(std::uint64_t count);

    /// Room for a compressed stream of `length` bytes, behind the previous one where it fits. Whoever refers to it must
    /// do so behind a barrier: a cluster that streams share is not yet counted durably.
    Result<HostOffset> take_bytes(std::uint64_t length);

    /// Takes back clusters that each have lost a reference just now, or were never given one. `table`: they hold
    /// metadata.
    void retire(ClusterRun run, bool table);

    /// Bytes of clusters retired since the last flush.
    [[nodiscard]] std::uint64_t retired_bytes() const {
        return retired_clusters_.load(std::memory_order_relaxed) << cluster_bits_;
    }

    struct RetiredRun {
        ClusterRun run;
        std::uint64_t epoch = 0;  // after it was taken out of the mapping
        bool table = false;
    };
    using Retired = std::vector<RetiredRun>;
    /// To be called before a flush; its result after it, if it succeeded.
    [[nodiscard]] Retired begin_flush();
    Result<void> end_flush(Retired retired);
    /// Where it failed.
    void flush_failed(Retired retired);

    /// Counts one reference more to each cluster of the runs: to all, or to none if it fails.
    Result<void> add_references(std::span<const ClusterRun> runs);
    /// Takes back clusters that have lost a reference durably, and that no request uses. What holds no other is free.
    Result<void> release(ClusterRun run, bool table);
    Result<void> load_refcounts(ClusterRun run, std::span<std::uint64_t> counts);

    /// Returns when every request has ended that may use what was taken out of sight before the call.
    void wait_for_requests();

    /// Gives back what is reserved, and cuts what is free off the end of the file. No request may be in flight.
    Result<void> give_back();

    /// Makes each refcount what the references come to. Nothing else may be in flight. Errc::corrupt where references
    /// cannot be counted, io.
    Result<void> rebuild();

private:
    static constexpr std::uint64_t max_window_bytes = 32 * MiB;
    static constexpr std::uint64_t min_reserved_clusters = 16;

    /// Reserved clusters that are taken from front to back.
    struct Queue {
        std::deque<ClusterRun> runs;
        std::uint64_t next = 1;  // how many are reserved the next time
    };

    [[nodiscard]] bool lacks_space(const Error& error) const;
    Result<std::vector<ClusterRun>> reserve(std::uint64_t wanted);
    Result<ClusterRun> reserve_for(std::uint64_t guest, std::uint64_t wanted);
    Result<void> refill(Queue& queue);
    static std::uint64_t take_front(Queue& queue);
    Result<std::vector<ClusterRun>> find_runs(std::uint64_t wanted);
    [[nodiscard]] Result<std::uint64_t> tail() const;
    Result<void> find_counted_end();
    Result<void> cut_tail();
    Result<void> count_and_zero(std::span<const ClusterRun> runs);

    Metadata& metadata_;
    WriteBack& write_back_;
    MetadataMap& map_;
    Epochs& epochs_;
    bool punch_;
    unsigned cluster_bits_;

    std::mutex mutex_;  // of all that follows, up to the other one
    Refcounts refcounts_;
    Reservations data_;
    Queue tables_;
    Queue streams_;
    std::vector<ClusterRun> left_over_;  // left over, and still counted
    std::uint64_t next_spare_ = 1;       // clusters to reserve for writes that go on nowhere
    std::uint64_t search_from_ = 0;      // no cluster before it is free
    std::uint64_t counted_end_ = 0;      // a file cut short may have refcounts past its end
    std::uint64_t least_end_ = 0;        // what somebody put behind the last counted cluster is not cut off
    HostOffset stream_end_;              // where the next compressed stream may go on; 0: nowhere

    std::atomic<std::uint64_t> retired_clusters_ = 0;
    std::mutex retired_mutex_;
    std::vector<RetiredRun> retired_;  // since the last flush began
    std::mutex durable_mutex_;
    std::vector<RetiredRun> durable_;  // dropped durably, but maybe in use by a request still
};

}  // namespace qcow::qcow2
