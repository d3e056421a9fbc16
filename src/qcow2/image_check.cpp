#include "qcow2/image_check.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "base/try.h"
#include "luks/volume.h"
#include "qcow2/compact_size.h"
#include "qcow2/findings.h"
#include "qcow2/metadata/directories.h"
#include "qcow2/refcount_comparison.h"
#include "qcow2/walker.h"

namespace qcow::qcow2 {
namespace {

/// What the references of a kind add to a cluster.
std::uint32_t uses_of(const Reference& reference) {
    const auto mark = !reference.active ? 0 : reference.copied ? References::copied : References::not_copied;
    switch (reference.kind) {
        case Structure::l2_table: return References::l2_table | mark;
        case Structure::data: return References::data | mark;
        case Structure::compressed: return References::compressed;
        default: return References::metadata;
    }
}

/// Whether it means that something was cut off. A file that grows over it would have zeros there.
bool is_cut(const Flaw& flaw) { return flaw.kind == Flaw::Kind::data_file_cut || flaw.kind == Flaw::Kind::past_end; }

/// Counts the references of an image, and keeps what is wrong with them.
class Counter : public Visitor {
public:
    Counter(const Metadata& metadata, std::uint64_t file_bytes, const CheckOptions& options, ReferenceMap& references)
        : geometry_(metadata.geometry()),
          disk_size_(metadata.state().size),
          cluster_bits_(metadata.geometry().cluster_bits),
          file_bytes_(file_bytes),
          references_(references),
          findings_(options.max_findings) {}

    Result<void> reference(const Reference& reference) override {
        if (reference.kind == Structure::refcount_table) blocks_.resize(reference.bytes / 8);
        const std::uint64_t first = reference.at.value >> cluster_bits_;
        const std::uint64_t last = (reference.at.value + reference.bytes - 1) >> cluster_bits_;
        TRY_VOID(references_.add(first, last - first + 1, reference.count, uses_of(reference)));
        note_missing(reference);
        if (reference.kind == Structure::refcount_block) blocks_[*reference.place.index] = reference.at;
        return {};
    }

    Result<void> flaw(const Flaw& flaw) override {
        if (flaw.hides_references) uncounted_ = true;
        if (is_cut(flaw)) note_cut(subject_of(flaw).value, [&] { return finding_of(flaw, cluster_bits_); });
        findings_.add(severity_of(flaw), subject_of(flaw).value, flaw.count,
                      [&] { return finding_of(flaw, cluster_bits_); });
        return {};
    }

    [[nodiscard]] std::uint64_t next_used(std::uint64_t first, std::uint64_t end) const override {
        return references_.next_used(first, end);
    }

    /// The refcount blocks by index in the refcount table, 0 for none; empty: the image has no refcounts.
    [[nodiscard]] const std::vector<HostOffset>& blocks() const { return blocks_; }
    /// Whether references exist that the walk could not follow.
    [[nodiscard]] bool uncounted() const { return uncounted_; }
    /// Bytes that the file lacks for its last table to be complete.
    [[nodiscard]] std::uint64_t missing_bytes() const { return missing_bytes_; }
    [[nodiscard]] const std::optional<CutTable>& cut_table() const { return cut_table_; }
    [[nodiscard]] Findings& findings() { return findings_; }
    /// The first place that leads behind the end of a file.
    [[nodiscard]] std::optional<Error> cut() const {
        if (!cut_) return std::nullopt;
        return Error{Errc::corrupt, cut_->second.place, cut_->second.what};
    }

private:
    /// The walk visits all tables on one thread, before what L2 tables lead to.
    void note_missing(const Reference& reference) {
        if (reference.kind == Structure::header || reference.kind == Structure::data ||
            reference.kind == Structure::compressed)
            return;
        const std::uint64_t end = reference.at.value + reference.bytes;
        // Writers may leave out the padding behind the last snapshot.
        const std::uint64_t padding = reference.kind == Structure::snapshot_table ? 7 : 0;
        if (end <= file_bytes_ + padding) return;
        missing_bytes_ = std::max(missing_bytes_, end - file_bytes_);
        if ((reference.kind == Structure::l1_table || reference.kind == Structure::l2_table) && !cut_table_)
            note_cut_table(reference);
    }

    void note_cut_table(const Reference& table) {
        const bool is_l1 = table.kind == Structure::l1_table;
        CheckFinding finding{
            .severity = CheckFinding::Severity::corruption,
            .place = fmt::format("the {} table at host offset {:#x}", is_l1 ? "L1" : "L2", table.at.value),
            .what = fmt::format("it ends {} bytes behind the file: the file was cut",
                                table.at.value + table.bytes - file_bytes_),
            .kind = CheckFinding::Kind::past_end,
            .cluster = HostOffset{align_down(file_bytes_, geometry_.cluster_size())},
            .remedy = CheckFinding::Remedy::correct_entry};
        note_cut(table.at.value, [&] { return finding; });
        findings_.add(finding.severity, table.at.value, 1, [&] { return finding; });
        // What the table maps, and what one of its entries does.
        const std::uint64_t begin = is_l1 ? 0 : table.place.index.value_or(0) * geometry_.l2_coverage();
        const std::uint64_t end = is_l1 ? disk_size_ : std::min(disk_size_, begin + geometry_.l2_coverage());
        const std::uint64_t mapped = is_l1 ? geometry_.l2_coverage() : geometry_.cluster_size();
        const std::uint64_t entry_bytes = is_l1 ? 8 : std::uint64_t{8} * geometry_.entry_words();
        const std::uint64_t first = std::min(end, begin + (file_bytes_ - table.at.value) / entry_bytes * mapped);
        cut_table_ = CutTable{std::move(finding), GuestOffset{first}, end - first, !table.active};
    }

    /// Keeps the first one in the file. Texts are made for that alone.
    template <class MakeFinding>
    void note_cut(std::uint64_t order, const MakeFinding& make_finding) {
        const std::lock_guard lock(cut_mutex_);
        if (!cut_ || order < cut_->first) cut_.emplace(order, make_finding());
    }

    const format::Geometry& geometry_;
    const std::uint64_t disk_size_;
    const unsigned cluster_bits_;
    const std::uint64_t file_bytes_;
    std::uint64_t missing_bytes_ = 0;
    std::optional<CutTable> cut_table_;
    ReferenceMap& references_;
    std::vector<HostOffset> blocks_;
    std::atomic<bool> uncounted_ = false;
    std::mutex cut_mutex_;
    std::optional<std::pair<std::uint64_t, CheckFinding>> cut_;
    Findings findings_;
};

/// An image whose references are being counted.
class Check {
public:
    Check(const Metadata& metadata, const CheckOptions& options) : metadata_(metadata), options_(options) {}

    Result<void> count(const Storage* data_file, bool refcounts = true) {
        file_bytes_ = TRY(walked_length(metadata_));
        // One more than the file has: a preallocated cluster may lie right behind its end.
        auto references = ReferenceMap::create(metadata_.geometry().clusters(file_bytes_) + 1, options_.memory_bytes);
        if (!references) return std::unexpected(std::move(references).error().in(metadata_.file().name()));
        references_ = *std::move(references);
        counter_.emplace(metadata_, file_bytes_, options_, *references_);
        WalkOptions walk_options;
        walk_options.refcounts = refcounts;
        walk_options.data_file = data_file;
        walk_options.workers = options_.workers;
        walk_options.memory_bytes = options_.memory_bytes;
        walk_options.control = options_.control;
        mapped_ = TRY(walk(metadata_, file_bytes_, walk_options, *counter_));
        return check_encryption();
    }

    Result<ComparedRefcounts> compare() {
        return compare_refcounts({.metadata = metadata_,
                                  .references = *references_,
                                  .blocks = counter_->blocks(),
                                  .file_bytes = file_bytes_,
                                  .uncounted = counter_->uncounted(),
                                  .workers = options_.workers,
                                  .control = options_.control},
                                 counter_->findings());
    }

    [[nodiscard]] std::optional<Error> cut() const { return counter_->cut(); }

    /// What was found so far.
    CheckReport report() {
        CheckReport report;
        const auto state = metadata_.state();
        report.dirty = state.has(format::incompatible::dirty);
        report.marked_corrupt = state.has(format::incompatible::corrupt);
        report.total_clusters = metadata_.geometry().clusters(state.size);
        report.allocated_clusters = mapped_.allocated;
        report.compressed_clusters = mapped_.compressed;
        report.fragmented_clusters = mapped_.fragmented;
        report.missing_bytes = counter_->missing_bytes();
        if (const auto bitmaps = read_bitmaps(metadata_)) {
            for (const auto& bitmap : *bitmaps) {
                if (bitmap.info.in_use && report.inconsistent_bitmaps.size() < options_.max_findings)
                    report.inconsistent_bitmaps.push_back(bitmap.info.name);
            }
        }
        counter_->findings().move_to(report);
        return report;
    }

    std::unique_ptr<ReferenceMap> take_references() { return std::move(references_); }
    [[nodiscard]] const Counter& counter() const { return *counter_; }
    [[nodiscard]] std::uint64_t file_bytes() const { return file_bytes_; }

private:
    /// Finds damage of the LUKS header, and what this build cannot open.
    Result<void> check_encryption() {
        if (metadata_.header().crypt != format::Crypt::luks) return {};
        const auto& [at, length] = *metadata_.header().encryption;
        const auto verified = luks::verify_header({metadata_.file(), at, length});
        if (verified) return {};
        const auto& error = verified.error();
        if (error.code != Errc::corrupt && error.code != Errc::unsupported) return std::unexpected(error);
        using Severity = CheckFinding::Severity;
        const auto severity = error.code == Errc::corrupt ? Severity::corruption : Severity::error;
        counter_->findings().add(severity, at.value, 1, [&] {
            return CheckFinding{.severity = severity,
                                .place = "encryption header",
                                .what = error.what,
                                .kind = CheckFinding::Kind::bad_encryption,
                                .cluster = HostOffset{align_down(at.value, metadata_.cluster_size())}};
        });
        return {};
    }

    const Metadata& metadata_;
    const CheckOptions& options_;
    std::uint64_t file_bytes_ = 0;
    std::unique_ptr<ReferenceMap> references_;
    std::optional<Counter> counter_;
    MappedClusters mapped_;
};

/// See CheckReport::compact_bytes.
std::uint64_t compact_gain(const Metadata& metadata, const Diagnosis& diagnosis) {
    const auto& report = diagnosis.report;
    if (report.corruptions + report.errors != 0 || report.dirty || report.marked_corrupt) return 0;
    if (metadata.header().crypt == format::Crypt::luks) return 0;
    if (diagnosis.blocks.empty()) return 0;  // the references do not include those of the refcount structures
    const auto size = compact_size(metadata, *diagnosis.references, diagnosis.blocks);
    const std::uint64_t bytes = size.clusters << metadata.geometry().cluster_bits;
    const std::uint64_t gain = diagnosis.file_bytes - std::min(diagnosis.file_bytes, bytes);
    return align_down(gain, metadata.cluster_size());
}

}  // namespace

Result<std::unique_ptr<ReferenceMap>> count_references(const Metadata& metadata, const CheckOptions& options) {
    Check check(metadata, options);
    TRY_VOID(check.count(nullptr));
    const auto report = check.report();
    if (report.corruptions == 0 && report.errors == 0) return check.take_references();
    const auto& first = report.findings.front();
    return fail(Errc::corrupt, first.place, first.what);
}

Result<std::optional<Hazard>> find_hazard(const Metadata& metadata, const Storage* data_file,
                                          const CheckOptions& options) {
    Check check(metadata, options);
    TRY_VOID(check.count(data_file));
    if (auto cut = check.cut()) {
        cut->what += ", so that a write would make lost data look like zeros";
        return Hazard{*std::move(cut), "copy what is left of it with qcow convert --salvage"};
    }
    auto compared = TRY(check.compare());
    if (!compared.undercounted) return std::nullopt;
    compared.undercounted->what += ", so that a write could destroy data";
    return Hazard{*std::move(compared.undercounted),
                  "repair it with qcow check -r all, or copy its contents with qcow convert"};
}

Result<Diagnosis> diagnose(const Metadata& metadata, const Storage* data_file, const CheckOptions& options,
                           bool refcounts) {
    Check check(metadata, options);
    const auto compare = [&]() -> Result<ComparedRefcounts> {
        TRY_VOID(check.count(data_file, refcounts));
        return check.compare();
    };
    auto compared = compare();
    if (!compared) return std::unexpected(std::move(compared).error().in("check"));
    Diagnosis diagnosis;
    diagnosis.report = check.report();
    diagnosis.report.counted_past_end = compared->counted_past_end;
    diagnosis.report.image_end = compared->image_end;
    diagnosis.cut_table = check.counter().cut_table();
    diagnosis.blocks = check.counter().blocks();
    diagnosis.file_bytes = check.file_bytes();
    diagnosis.uncounted = check.counter().uncounted();
    diagnosis.references = check.take_references();
    diagnosis.report.compact_bytes = compact_gain(metadata, diagnosis);
    return diagnosis;
}

Result<CheckReport> check_image(const Metadata& metadata, const Storage* data_file, const CheckOptions& options) {
    return TRY(diagnose(metadata, data_file, options)).report;
}

}  // namespace qcow::qcow2
