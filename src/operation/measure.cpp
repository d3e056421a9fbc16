#include "qcow/measure.h"

#include <algorithm>
#include <memory>

#include "base/bits.h"
#include "base/going_on.h"
#include "base/within_memory.h"
#include "format/tables.h"
#include "luks/volume.h"
#include "operation/new_image.h"
#include "qcow2/create_options.h"
#include "qcow2/layout.h"

namespace qcow {
namespace {

using qcow2::Recorded;

/// Counts the clusters that a conversion stores if it finds no zeros in the data. A cluster with data in a part of it
/// is stored.
Result<void> count_source(Disk& source, std::uint64_t target_size, std::uint64_t cluster_size, Recorded holes,
                          qcow2::SpaceCount& count, const JobControl& control) {
    std::uint64_t counted = 0;
    TRY_VOID(each_extent(
        source, {0}, source.size(),
        [&](const Extent& extent) -> Result<void> {
            TRY_VOID(verify_goes_on(control));
            const std::uint64_t extent_end = extent.start.value + extent.length;
            if (control.progress) control.progress(extent_end, source.size());
            if (extent.kind != Extent::Kind::data) return {};
            const std::uint64_t begin = std::max(counted, align_down(extent.start.value, cluster_size));
            const std::uint64_t end = divide_up(extent_end, cluster_size) * cluster_size;
            count.add(counted, begin, holes);
            if (begin < end) count.add(begin, end, Recorded::cluster);
            counted = std::max(begin, end);
            return {};
        }));
    if (counted < target_size) count.add(counted, target_size, holes);
    return {};
}

/// Returns the space for the bitmaps of `image` in a new image with the same disk.
Result<std::optional<std::uint64_t>> measure_bitmaps(const Image& image, std::uint64_t cluster_size) {
    const auto info = TRY(image.info());
    if (info.version < 3 || info.bitmaps_error) return std::nullopt;
    const auto whole_clusters = [&](std::uint64_t bytes) { return divide_up(bytes, cluster_size) * cluster_size; };
    std::uint64_t bytes = 0;
    std::uint64_t directory = 0;
    for (const auto& bitmap : info.bitmaps) {
        if (bitmap.in_use) continue;
        const std::uint64_t bits = whole_clusters(divide_up(divide_up(info.virtual_size, bitmap.granularity), 8));
        bytes += bits + whole_clusters(bits / cluster_size * 8);
        directory += format::BitmapEntry::encoded_size(bitmap.name.size(), 0);
    }
    return bytes + whole_clusters(directory);
}

Result<Measurement> measure_raw(const MeasureJob& job, const Disk* source) {
    TRY_VOID(verify_raw(job.options));
    const auto size = source != nullptr ? TRY(size_for(*source, job.options)) : rounded_size(job.options.size);
    return Measurement{.required = size, .fully_allocated = size};
}

Result<Measurement> measure_luks(const MeasureJob& job, const Disk* source) {
    TRY_VOID(verify_luks(job.options));
    const auto size = source != nullptr ? TRY(size_for(*source, job.options)) : rounded_size(job.options.size);
    const auto whole = TRY(luks::header_bytes(*job.options.encryption)) + size;
    return Measurement{.required = whole, .fully_allocated = whole};
}

Result<Measurement> measure_qcow2(const MeasureJob& job, Disk* source, const JobControl& control) {
    auto options = job.options;
    if (source != nullptr) options.size = TRY(size_for(*source, options));
    const auto header = TRY(qcow2::header_for(options));
    const qcow2::EmptyClusters empty(header, options.preallocation);
    qcow2::SpaceCount count(header);
    if (source == nullptr) {
        count.add(0, header.size, empty.holes);
    } else {
        // The backing file is not read: it may have data wherever the source has none.
        const auto holes = options.backing_name.empty() ? empty.holes : empty.zeros;
        TRY_VOID(count_source(*source, header.size, options.cluster_size, holes, count, control));
    }
    TRY_VOID(count.verify_fits());
    qcow2::SpaceCount all(header);
    all.add(0, header.size, Recorded::cluster);
    Measurement measured{.required = count.file_bytes(), .fully_allocated = all.file_bytes()};
    if (!options.data_file_name.empty()) measured.data_file = header.size;
    return measured;
}

Result<Measurement> measure_job(const MeasureJob& job, const JobControl& control) {
    const auto named = TRY(with_recorded_names({.format = job.format, .options = job.options}));
    const MeasureJob recorded{job.source, job.format, named.options};
    std::shared_ptr<Image> image;
    std::shared_ptr<Disk> disk;
    if (job.source) {
        image = TRY(open_image(job.source->image, control.warn));
        disk = image;
        if (!job.source->snapshot.empty()) disk = TRY(image->snapshots().open(job.source->snapshot));
    }
    if (job.format == Format::raw) return measure_raw(recorded, disk.get());
    if (job.format == Format::luks) return measure_luks(recorded, disk.get());
    auto measured = TRY(measure_qcow2(recorded, disk.get(), control));
    if (image && job.options.version >= 3) measured.bitmaps = TRY(measure_bitmaps(*image, job.options.cluster_size));
    return measured;
}

}  // namespace

Result<Measurement> measure(const MeasureJob& job, const JobControl& control) {
    return within_memory([&] { return measure_job(job, control); });
}

}  // namespace qcow
