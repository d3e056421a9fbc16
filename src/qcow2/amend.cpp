#include "qcow2/amend.h"

#include <fmt/format.h>

#include <bit>
#include <functional>

#include "base/going_on.h"
#include "format/header_edit.h"
#include "format/refcount.h"
#include "qcow2/image_check.h"
#include "qcow2/metadata/directories.h"
#include "qcow2/metadata/metadata_map.h"
#include "qcow2/repair_plan.h"
#include "qcow2/repair_refcounts.h"

namespace qcow::qcow2 {
namespace {

constexpr std::size_t amend_cache_bytes = 1 * MiB;

unsigned order_of(unsigned refcount_bits) { return static_cast<unsigned>(std::countr_zero(refcount_bits)); }

Result<format::Header> read_header(const Storage& file) { return format::parse_header(TRY(read_first_cluster(file))); }

/// What `header` says of the file, which need not be what the file says.
std::unique_ptr<Metadata> metadata_of(const std::shared_ptr<Storage>& file, const format::Header& header) {
    return std::make_unique<Metadata>(header, file, amend_cache_bytes);
}

/// Counts the references of an image, except those of its refcount table.
Result<Diagnosis> count(const Metadata& metadata, const JobControl& control) {
    CheckOptions options;
    options.control.stop = control.stop;
    auto diagnosis = TRY(diagnose(metadata, nullptr, options, false));
    if (!diagnosis.uncounted && diagnosis.report.corruptions == 0) return diagnosis;
    const auto& first = diagnosis.report.findings.front();
    return fail(Errc::corrupt, metadata.file().name(),
                fmt::format("{}: {}; run qcow check -r all first", first.place, first.what));
}

/// Changes the header, in steps that are each durable before the next.
Result<void> edit(Storage& file, const std::function<void(format::HeaderEdit&)>& change) {
    format::HeaderEdit header(TRY(read_first_cluster(file)));
    change(header);
    for (const auto& step : TRY(header.steps())) {
        TRY_VOID(file.write({0}, step));
        TRY_VOID(file.flush());
    }
    return {};
}

/// Writes new refcounts behind everything else, and makes the header lead to them with one write. The old ones are not
/// counted by the new ones, and so free.
Result<void> change_refcount_bits(const std::shared_ptr<Storage>& file, unsigned bits, const JobControl& control) {
    auto header = TRY(read_header(*file));
    if (header.refcount_order == order_of(bits)) return {};
    const format::HeaderState old = header;
    header.refcount_order = order_of(bits);
    const auto metadata = metadata_of(file, header);
    const auto diagnosis = TRY(count(*metadata, control));
    NewClusters added(*metadata, diagnosis, {});
    const auto fresh = TRY(write_new_refcounts(*metadata, diagnosis, added, *file));
    TRY_VOID(verify_goes_on(control));
    TRY_VOID(file->flush());
    return edit(*file, [&](format::HeaderEdit& edited) {
        auto state = old;
        state.refcount_table = fresh.table;
        state.refcount_table_clusters = fresh.table_clusters;
        edited.set_state(state);
        edited.set_refcount_order(order_of(bits));
    });
}

Result<void> change_features(Storage& file, const AmendOptions& options) {
    const auto header = TRY(read_header(file));
    return edit(file, [&](format::HeaderEdit& edited) {
        format::HeaderState state = header;
        if (options.lazy_refcounts) {
            state.compatible &= ~format::compatible::lazy_refcounts;
            if (*options.lazy_refcounts) state.compatible |= format::compatible::lazy_refcounts;
        }
        // Features that are not known may depend on what changes.
        state.autoclear &= format::autoclear::bitmaps | format::autoclear::raw_external_data;
        if (options.data_file_raw == false) state.autoclear &= ~format::autoclear::raw_external_data;
        if (options.compression && *options.compression != header.compression) {
            state.incompatible ^= format::incompatible::compression_type;
            edited.set_compression(*options.compression);
        }
        if (header.version >= 3) edited.set_state(state);
        if (options.data_file_name)
            edited.set_extension(format::ExtensionType::data_file_name, as_bytes(*options.data_file_name));
    });
}

}  // namespace

Result<void> verify_structures(const std::shared_ptr<Storage>& file) {
    const auto header = TRY(read_header(*file));
    if (auto sound = format::verify_not_marked_corrupt(header); !sound)
        return std::unexpected(std::move(sound).error().in(file->name()));
    if (header.encryption && !lies_within(header.encryption->offset.value, header.encryption->length,
                                          TRY(file->size()))) {
        return fail(Errc::corrupt, file->name(),
                    "its encryption header does not lie within the file; check the image before it is written");
    }
    const auto metadata = metadata_of(file, header);
    return MetadataMap(header.cluster_bits).load(*metadata);
}

Result<void> verify_refcounts_fit(const std::shared_ptr<Storage>& file, unsigned bits, const JobControl& control) {
    const auto header = TRY(read_header(*file));
    const std::uint64_t most = format::max_refcount(order_of(bits));
    if (order_of(bits) == header.refcount_order) return {};
    const auto diagnosis = TRY(count(*metadata_of(file, header), control));
    const auto& references = *diagnosis.references;
    for (std::uint64_t cluster = 0; cluster < references.clusters(); ++cluster) {
        cluster = references.next_used(cluster, references.clusters());
        if (cluster == references.clusters()) break;
        const auto found = references.at(cluster).count();
        if (found <= most) continue;
        return fail(
            Errc::invalid_argument, file->name(),
            fmt::format("refcounts of {} bits: the cluster at host offset {:#x} has {} references, of snapshots "
                        "or compressed data, and they can express {}",
                        bits, cluster << header.cluster_bits, found, most));
    }
    return {};
}

Result<void> amend_header(const std::shared_ptr<Storage>& file, const AmendOptions& options,
                          const JobControl& control) {
    const auto version = TRY(read_header(*file)).version;
    if (options.version.value_or(version) > version)
        TRY_VOID(edit(*file, [](format::HeaderEdit& edited) { edited.set_version(3); }));
    TRY_VOID(change_features(*file, options));
    if (options.refcount_bits) TRY_VOID(change_refcount_bits(file, *options.refcount_bits, control));
    if (options.version.value_or(version) >= version) return {};
    // The shorter header then changes in its first sector alone, if names are not very long.
    TRY_VOID(
        edit(*file, [](format::HeaderEdit& edited) { edited.remove_extension(format::ExtensionType::feature_names); }));
    return edit(*file, [](format::HeaderEdit& edited) { edited.set_version(2); });
}

}  // namespace qcow::qcow2
