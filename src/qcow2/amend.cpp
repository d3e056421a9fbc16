#include "qcow2/amend.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <functional>
#include <vector>

#include "base/going_on.h"
#include "format/header_edit.h"
#include "format/refcount.h"
#include "qcow2/image_check.h"
#include "qcow2/metadata/directories.h"
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

/// Overwrites the clusters of one copy of an encryption header that nothing uses.
Result<void> overwrite_copy(Storage& file, const Metadata& metadata, const ReferenceMap& references,
                            std::uint64_t first) {
    const auto count = metadata.geometry().clusters(metadata.header().encryption->length);
    const auto end = std::min(references.clusters(), first + count);
    const auto size = TRY(file.size());
    for (auto cluster = first; cluster < end; ++cluster) {
        const HostOffset at{cluster * metadata.cluster_size()};
        if (references.at(cluster).word != 0 || at.value >= size) continue;
        const std::vector<std::byte> zeros(std::min(metadata.cluster_size(), size - at.value));
        TRY_VOID(file.write(at, zeros));
    }
    return file.flush();
}

/// An interrupted compaction leaves a copy of the key slots in clusters that nothing uses. A slot that is erased later
/// would live on in it.
Result<void> overwrite_copies(Storage& file, const Metadata& metadata, const ReferenceMap& references) {
    constexpr std::size_t magic_bytes = 6;
    constexpr std::size_t uuid_at = 168;
    std::array<std::byte, 208> ours = {};
    std::array<std::byte, 208> theirs = {};
    TRY(file.read(metadata.header().encryption->offset, ours));
    const auto size = TRY(file.size());
    std::uint64_t next = 0;
    for (std::uint64_t cluster = 0; cluster < references.clusters(); cluster = next) {
        const HostOffset at{cluster * metadata.cluster_size()};
        next = cluster + 1;
        if (at.value >= size) break;
        if (references.at(cluster).word != 0) continue;
        const auto run = TRY(file.run(at, size - at.value));
        if (!run.data) {
            next = std::max(next, cluster + run.length / metadata.cluster_size());
            continue;
        }
        TRY(file.read(at, theirs));
        const bool is_copy = std::equal(ours.begin(), ours.begin() + magic_bytes, theirs.begin()) &&
                             std::equal(ours.begin() + uuid_at, ours.end(), theirs.begin() + uuid_at);
        if (is_copy) TRY_VOID(overwrite_copy(file, metadata, references, cluster));
    }
    return {};
}

}  // namespace

Result<void> prepare_key_slots(const std::shared_ptr<Storage>& file, const JobControl& control) {
    const auto header = TRY(read_header(*file));
    if (auto sound = format::verify_not_marked_corrupt(header); !sound)
        return std::unexpected(std::move(sound).error().in(file->name()));
    if (!header.encryption) return {};
    if (!lies_within(header.encryption->offset.value, header.encryption->length, TRY(file->size()))) {
        return fail(Errc::corrupt, file->name(),
                    "its encryption header does not lie within the file; check the image before it is written");
    }
    const auto metadata = metadata_of(file, header);
    CheckOptions options;
    options.control.stop = control.stop;
    const auto diagnosis = TRY(diagnose(*metadata, nullptr, options));
    for (const auto& found : diagnosis.report.findings) {
        // The key slots themselves are what changes.
        if (found.severity != CheckFinding::Severity::corruption || found.kind == CheckFinding::Kind::bad_encryption)
            continue;
        return fail(Errc::corrupt, file->name(),
                    fmt::format("{}: {}, so that a change of key slots could destroy data; repair it with qcow check "
                                "-r all, or copy its contents with qcow convert",
                                found.place, found.what));
    }
    return overwrite_copies(*file, *metadata, *diagnosis.references);
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
