#include "qcow2/resizing.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "base/try.h"

namespace qcow::qcow2 {

using format::L2Entry;

Result<void> Resizing::verify(std::uint64_t size) const {
    const auto& metadata = metadata_.metadata();
    if (metadata.header().version < 3 && metadata.state().snapshot_count != 0) {
        return fail(Errc::unsupported, metadata.file().name(),
                    "it has snapshots, and version 2 cannot record that theirs is another size; use version 3");
    }
    const std::uint64_t most = (format::max_l1_bytes / 8) * metadata.geometry().l2_coverage();
    if (size <= most && size <= static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) return {};
    return fail(Errc::invalid_argument, metadata.file().name(),
                fmt::format("{} bytes are more than clusters of {} can map", size, metadata.cluster_size()));
}

Result<void> Resizing::resize(std::uint64_t size) {
    auto& metadata = metadata_.metadata();
    const std::uint64_t old_size = metadata.state().size;
    TRY_VOID(bitmaps_.begin_resize(size));
    auto resized = size > old_size ? grow(old_size, size) : shrink(old_size, size);
    mapping_.grow_to(0);
    auto bitmaps = metadata.state().size == size ? bitmaps_.finish_resize(size) : bitmaps_.cancel_resize();
    metadata.publish_size();
    return resized ? bitmaps : resized;
}

Result<void> Resizing::set_header_size(std::uint64_t size) {
    return metadata_.change_header([&](format::HeaderState& state) { state.size = size; });
}

Result<void> Resizing::grow(std::uint64_t old_size, std::uint64_t size) {
    const std::uint64_t coverage = mapping_.rules().geometry.l2_coverage();
    const std::uint64_t old_tables_end = metadata_.metadata().state().l1_entries * coverage;
    TRY_VOID(mapping_.grow_l1(divide_up(size, coverage)));
    if (parts_.data.is_external()) TRY_VOID(parts_.data.resize(size));
    mapping_.grow_to(size);
    TRY_VOID(zero_new_bytes(old_size, size, old_tables_end));
    TRY_VOID(metadata_.flush());
    return set_header_size(size);
}

Result<void> Resizing::zero_new_bytes(std::uint64_t old_size, std::uint64_t size, std::uint64_t old_tables_end) {
    const auto& backing = parts_.backing.image();
    const bool shines_through = parts_.backing.exists() && (!backing || backing->size() > old_size);
    if (shines_through || parts_.data.is_raw())
        return zeroing_.zero({old_size}, size - old_size, Zeroing::Mode::release);
    // What the last cluster has behind the old end was nobody's, nor what tables have there: another program may have
    // left entries behind a smaller size. The rest is not recorded, or a large disk would take space.
    const auto& geometry = mapping_.rules().geometry;
    const std::uint64_t cluster_end = geometry.clusters(old_size) * geometry.cluster_size();
    const std::uint64_t end = std::min(size, std::max(cluster_end, old_tables_end));
    return zeroing_.zero({old_size}, end - old_size, Zeroing::Mode::forget);
}

Result<void> Resizing::shrink(std::uint64_t old_size, std::uint64_t size) {
    auto& metadata = metadata_.metadata();
    const auto& geometry = mapping_.rules().geometry;
    TRY_VOID(set_header_size(size));
    metadata.publish_size();
    // The header is durable: what it no longer covers can go.
    const std::uint64_t end = geometry.clusters(old_size);
    for (std::uint64_t first = geometry.clusters(size); first < end;) {
        std::uint64_t last = std::min(end, mapping_.table_end(first));
        const GuestOffset at = mapping_.offset_of(first);
        if (geometry.l2_index(at) == 0) {
            TRY_VOID(mapping_.drop_table(first));
        } else if (TRY(mapping_.l1_entry(at)).allocated()) {
            last = std::min(last, mapping_.page_end(first));
            const auto guard = mapping_.lock({first, last});
            const auto old = TRY(mapping_.load({first, last}));
            Change change(metadata_);
            TRY_VOID(mapping_.replace(change, first, old, std::vector<L2Entry>(old.size()), Barrier::none));
        }
        first = last;
        TRY_VOID(metadata_.flush_if_full());
    }
    if (parts_.data.is_external()) TRY_VOID(parts_.data.resize(size));
    return metadata_.flush();
}

}  // namespace qcow::qcow2
