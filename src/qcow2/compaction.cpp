#include "qcow2/compaction.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "base/going_on.h"
#include "base/workers.h"
#include "codec/compressor.h"
#include "disk/encrypted.h"
#include "qcow2/cluster_moves.h"
#include "qcow2/cluster_use.h"
#include "qcow2/image_check.h"
#include "qcow2/metadata/directories.h"
#include "qcow2/refcount_trimming.h"
#include "qcow2/repair.h"
#include "qcow2/repair_directories.h"
#include "qcow2/stream_packing.h"
#include "qcow2/unmapping.h"
#include "storage/planned_file.h"

namespace qcow::qcow2 {
namespace {

constexpr std::size_t compaction_cache_bytes = 64 * KiB;
constexpr std::uint64_t batch_streams = 256 * KiB;

/// Adds the move of a cluster to a list.
void append(std::vector<ClusterMove>& moves, std::uint64_t from, std::uint64_t to) {
    if (!moves.empty() && moves.back().from + moves.back().count == from &&
        moves.back().to + moves.back().count == to) {
        ++moves.back().count;
    } else {
        moves.push_back({from, to, 1});
    }
}

/// Gives back what nothing uses, compresses data if asked to, and then works in rounds. Each one makes the file
/// shorter, or brings clusters from behind the end that it will have into free ones in front of it:
/// 1. Refcount blocks that count nothing are dropped.
/// 2. Structures of several clusters move to where there is room for them. If there is none, what is in the way moves.
/// 3. Compressed streams move.
/// 4. Single clusters move, in the order that they have, so that runs stay runs.
/// Each step starts with an image without leaks, and ends with one.
class Compaction {
public:
    Compaction(std::shared_ptr<Storage> file, PlannedFile* planned, const Storage* data_file, const CompactJob& job,
               const JobControl& control, std::uint64_t batch_bytes, std::shared_ptr<const crypto::SectorCipher> cipher)
        : file_(std::move(file)),
          planned_(planned),
          data_file_(data_file),
          job_(job),
          control_(control),
          batch_bytes_(batch_bytes),
          cipher_(cipher),
          encryption_(cipher ? std::make_unique<EncryptedBytes>(std::move(cipher)) : nullptr) {
        copying_.copy = [this](HostOffset from, HostOffset to, std::uint64_t length, Copying::Contents contents) {
            return copy(from, to, length, contents);
        };
        copying_.workers = planned_ != nullptr ? 1 : job_.workers == 0 ? default_workers() : job_.workers;
        copying_.write = [this](HostOffset to, std::span<const std::byte> stream) {
            return planned_ != nullptr ? planned_->allocate(to, stream.size()) : file_->write(to, stream);
        };
        copying_.flush = [this] { return flush_and_cut(); };
    }

    Result<CompactResult> run() {
        result_.size_before = TRY(file_->size());
        // What another program has written is as durable as what follows from it.
        TRY_VOID(file_->flush());
        TRY_VOID(open());
        result_.cluster_size = image_->cluster_size();
        TRY_VOID(verify_possible());
        auto diagnosis = TRY(check());
        TRY_VOID(verify_sound(diagnosis.report));
        if (diagnosis.report.missing_bytes > 0) {
            // The last cluster moves as a whole.
            TRY_VOID(file_->resize(diagnosis.file_bytes + diagnosis.report.missing_bytes));
            TRY_VOID(open());
            diagnosis = TRY(check());
        }
        result_.leaked_clusters = diagnosis.report.leaks;
        const bool shortened = TRY(shorten_l1());
        const bool unmapped = TRY(unmap_zeros(*image_, DataFile(*image_, nullptr, cipher_),
                                              {.zeroes = job_.zeroes, .workers = job_.workers, .control = control_}));
        if (shortened || unmapped || diagnosis.report.leaks + diagnosis.report.counted_past_end > 0) {
            diagnosis.references.reset();
            result_.unmapped_clusters = TRY(give_back_leaks()) - result_.leaked_clusters;
            result_.changed = true;
            TRY_VOID(open());
            diagnosis = TRY(check());
            TRY_VOID(verify_sound(diagnosis.report));
        }
        if (job_.compress) {
            // There may be no free cluster yet. A device has the space that it has.
            auto grown = file_->resize(diagnosis.file_bytes + batch_bytes_);
            if (!grown && grown.error().code != Errc::no_space) return std::unexpected(std::move(grown).error());
            TRY_VOID(open());
            diagnosis = TRY(check());
        }
        use_.emplace(image_->header(), std::move(diagnosis.references), std::move(diagnosis.blocks));
        TRY_VOID(verify_countable());
        TRY_VOID(use_->find_structures(*image_));
        TRY_VOID(forget_snapshot_table());
        if (job_.compress) TRY_VOID(compress_data());
        TRY_VOID(compact());
        result_.size_after = TRY(file_->size());
        result_.changed |= result_.size_after != result_.size_before;
        return result_;
    }

private:
    Result<void> open() {
        image_ =
            std::make_unique<Metadata>(
                TRY(format::parse_header(TRY(read_first_cluster(*file_)))), file_, compaction_cache_bytes);
        return {};
    }

    Result<Diagnosis> check() {
        CheckOptions options;
        options.workers = job_.workers;
        options.max_findings = 1;
        options.memory_bytes = job_.memory_bytes;
        options.control.stop = control_.stop;
        return diagnose(*image_, data_file_, options);
    }

    [[nodiscard]] Result<void> verify_possible() const {
        const auto& name = image_->file().name();
        if (!job_.compress) return {};
        if (image_->header().crypt != format::Crypt::none) {
            return fail(
                Errc::unsupported, name,
                "the image is encrypted, and compressed clusters would not be: the format leaves them readable");
        }
        if (image_->rules().external_data)
            return fail(Errc::unsupported, name, "an external data file cannot hold compressed clusters");
        TRY(codec::make_compressor(image_->header().compression, job_.level));
        return {};
    }

    [[nodiscard]] Result<void> verify_sound(const CheckReport& report) const {
        std::string what;
        if (report.marked_corrupt) {
            what = "it is marked as corrupt";
        } else if (report.dirty) {
            what = "it was not closed by its last writer";
        } else if (report.corruptions + report.errors > 0) {
            what = report.findings.front().place + ": " + report.findings.front().what;
        } else {
            return {};
        }
        return fail(Errc::corrupt, file_->name(), what + "; repair it with qcow check -r all first");
    }

    /// More references than the map can count could not be followed.
    [[nodiscard]] Result<void> verify_countable() const {
        bool countable = true;
        each_used_backwards(use_->references(), 0, use_->clusters(), [&](std::uint64_t, References one) {
            return countable = one.count() < References::max_count;
        });
        if (countable) return {};
        return fail(Errc::limit_exceeded, file_->name(),
                    fmt::format("a cluster has {} references or more", References::max_count));
    }

    /// Forgets tables behind the end of the disk: it was longer, or a snapshot with a VM state was applied. What they
    /// lead to leaks then. Returns whether there were any.
    Result<bool> shorten_l1() {
        auto state = image_->state();
        const auto tables = divide_up(state.size, image_->geometry().l2_coverage());
        if (state.l1_entries <= std::max<std::uint64_t>(tables, 1)) return false;
        state.l1_entries = static_cast<std::uint32_t>(std::max<std::uint64_t>(tables, 1));
        TRY_VOID(write_header(*file_, TRY(header_steps(*file_, state))));
        TRY_VOID(open());
        return true;
    }

    /// Returns the number of leaked clusters.
    Result<std::uint64_t> give_back_leaks() {
        RepairOptions options;
        options.what = RepairOptions::What::leaks;
        options.workers = job_.workers;
        options.max_findings = 1;
        options.memory_bytes = job_.memory_bytes;
        options.control.stop = control_.stop;
        return TRY(repair_image(file_, data_file_, options)).before.leaks;
    }

    Result<void> compact() {
        for (;;) {
            TRY_VOID(verify_goes_on(control_));
            if (TRY(change_refcounts())) {
                result_.changed = true;
                TRY_VOID(open());
                TRY_VOID(use_->find_structures(*image_));
                continue;
            }
            if (TRY(move_structures())) continue;
            if (TRY(move_streams())) continue;
            if (TRY(move_clusters())) continue;
            return cut();
        }
    }

    Result<bool> change_refcounts() {
        return TRY(drop_refcount_blocks(*image_, *use_)) || TRY(shrink_refcount_table(*image_, *use_)) ||
               TRY(add_refcount_block(*image_, *use_, target()));
    }

    /// Compresses the data clusters of the file, from its end to its beginning.
    Result<void> compress_data() {
        for (std::uint64_t end = use_->clusters(); end > 0;) {
            TRY_VOID(cut());  // streams may lie behind the end
            TRY_VOID(verify_goes_on(control_));
            std::vector<std::uint64_t> clusters;
            std::uint64_t first = 0;
            each_used_backwards(use_->references(), 0, end, [&](std::uint64_t cluster, References one) {
                if ((one.word & References::uses) != References::data) return true;
                clusters.push_back(cluster);
                first = cluster;
                return clusters.size() << cluster_bits() < batch_bytes_;
            });
            if (clusters.empty()) return {};
            std::ranges::reverse(clusters);
            Moves moves;
            moves.compressed = TRY(compress_clusters(*image_, use_->references(),
                                                     TRY(find_plain_clusters(*image_, clusters, job_.workers)),
                                                     job_.level, job_.workers));
            std::ranges::reverse(moves.compressed);
            const auto found = moves.compressed.size();
            pack_compressed(*image_, use_->free_runs(0, use_->counted_end(), room_for(found)), moves.compressed);
            if (moves.empty() && found > 0) return {};
            // Those that found no room come again. Others have left some now.
            end = moves.compressed.size() < found ? moves.compressed.back().from : first;
            if (!moves.empty()) TRY_VOID(carry_out(moves));
        }
        return {};
    }

    // The present state.

    [[nodiscard]] unsigned cluster_bits() const { return image_->header().cluster_bits; }

    /// The size that the file is to have.
    [[nodiscard]] CompactSize target() const { return compact_size(*image_, use_->references(), use_->blocks()); }

    // Moving.

    Result<void> carry_out(Moves& moves) {
        moves.sort();
        TRY_VOID(qcow2::carry_out(*image_, moves, {use_->references(), use_->blocks()}, copying_, job_.workers));
        TRY_VOID(open());
        use_->follow(moves);
        for (const auto& move : moves.clusters) result_.moved_clusters += move.count;
        result_.moved_streams += moves.streams.size();
        result_.compressed_clusters += moves.compressed.size();
        result_.changed = true;
        TRY_VOID(find_free_end());
        const std::uint64_t end = free_end_.value_or(TRY(file_->size()));
        const auto punch = [&](std::uint64_t first, std::uint64_t count) {
            const HostOffset at{first << cluster_bits()};
            if (at.value >= end || planned_ != nullptr) return;
            // If it fails, the space is not given back yet.
            static_cast<void>(file_->write_zeroes(at, std::min(count << cluster_bits(), end - at.value)));
        };
        for (const auto& move : moves.clusters) punch(move.from, move.count);
        for (const auto& one : moves.compressed) punch(one.from, 1);
        if (control_.progress && total_bytes_ > 0) {
            done_bytes_ = std::min(total_bytes_, done_bytes_ + batch_length(moves));
            control_.progress(done_bytes_, total_bytes_);
        }
        return {};
    }

    [[nodiscard]] std::uint64_t batch_length(const Moves& moves) const {
        std::uint64_t bytes = 0;
        for (const auto& move : moves.clusters) bytes += move.count << cluster_bits();
        for (const auto& stream : moves.streams) bytes += stream.length;
        return bytes;
    }

    /// Holes stay holes.
    Result<void> copy(HostOffset from, HostOffset to, std::uint64_t length, Copying::Contents contents) {
        if (planned_ != nullptr && contents != Copying::Contents::metadata) return planned_->allocate(to, length);
        const bool depends_on_place = image_->header().crypt == format::Crypt::luks;
        if (depends_on_place && contents == Copying::Contents::data) return encryption_->copy(*file_, from, to, length);
        thread_local std::vector<std::byte> buffer;
        while (length > 0) {
            auto run = TRY(file_->run(from, length));
            if (run.data) {
                // What the file system shares takes no time. The old place is cut off soon.
                const auto shared =
                    contents == Copying::Contents::data ? TRY(file_->copy_from(*file_, from, to, run.length)) : 0;
                if (shared == 0) {
                    buffer.resize(run.length);
                    TRY(file_->read(from, buffer));
                    TRY_VOID(file_->write(to, buffer));
                } else {
                    run.length = shared;
                }
            } else {
                // The last byte makes the file long enough.
                TRY_VOID(file_->write(HostOffset{to.value + run.length - 1}, std::array<std::byte, 1>{}));
                TRY_VOID(file_->write_zeroes(to, run.length));
            }
            from += run.length;
            to += run.length;
            length -= run.length;
        }
        return {};
    }

    /// Flushes the file, and cuts off meanwhile what earlier moves have freed: some file systems take long to free
    /// blocks.
    Result<void> flush_and_cut() {
        const auto end = std::exchange(free_end_, std::nullopt);
        if (!end || planned_ != nullptr) {
            if (end) TRY_VOID(file_->resize(*end));
            return file_->flush();
        }
        return run_workers(2, [&](unsigned worker) { return worker == 0 ? file_->resize(*end) : file_->flush(); });
    }

    /// Finds out where the file can be cut. Nothing durable leads behind it.
    Result<void> find_free_end() {
        free_end_ = use_->used_end() << cluster_bits();
        if (TRY(file_->size()) <= *free_end_) free_end_.reset();
        return {};
    }

    /// Ends the file with the last cluster in use, which a compressed stream may not fill.
    Result<void> cut() {
        free_end_.reset();
        const auto end = use_->used_end() << cluster_bits();
        const auto size = TRY(file_->size());
        if (size != end) {
            auto resized = file_->resize(end);
            // A device has the space that it has.
            if (!resized && (size > end || resized.error().code != Errc::no_space)) return resized;
        }
        return file_->flush();
    }

    /// Without snapshots the place of their table means nothing, but readers refuse one behind the end of the file.
    Result<void> forget_snapshot_table() {
        auto state = image_->state();
        const bool may_be_cut = job_.compress || state.snapshot_table.value >= target().clusters << cluster_bits();
        if (state.snapshot_count != 0 || state.snapshot_table.value == 0 || !may_be_cut) return {};
        state.snapshot_table = {0};
        TRY_VOID(write_header(*file_, TRY(header_steps(*file_, state))));
        result_.changed = true;
        return open();
    }

    // 2. Structures of several clusters.

    Result<bool> move_structures() {
        const auto size = target();
        std::vector<ClusterRun> displaced;
        for (const auto& structure : use_->structures()) {
            if (structure.end() > size.clusters) displaced.push_back(structure);
        }
        if (displaced.empty() || stuck_at_ == size.clusters) return false;
        // The longest first, because it finds the fewest places.
        std::ranges::sort(displaced, [](const ClusterRun& a, const ClusterRun& b) {
            return a.count != b.count ? a.count > b.count : a.first < b.first;
        });
        auto free = use_->free_runs(0, size.clusters, size.clusters, displaced.back().count);
        Moves moves;
        std::uint64_t bytes = 0;
        for (const auto& structure : displaced) {
            const auto room = std::ranges::find_if(free, [&](const auto& run) { return run.count >= structure.count; });
            if (room == free.end()) continue;
            moves.clusters.push_back({structure.first, room->first, structure.count});
            room->first += structure.count;
            room->count -= structure.count;
            bytes += structure.count << cluster_bits();
            if (bytes >= batch_bytes_) break;
        }
        if (moves.empty()) {
            for (const auto& structure : displaced) {
                if (TRY(make_room(structure, size))) return true;
            }
            stuck_at_ = size.clusters;
            return false;
        }
        TRY_VOID(carry_out(moves));
        return true;
    }

    /// Moves the clusters that are in the way of a structure. Returns false if there is no place for it.
    Result<bool> make_room(const ClusterRun& structure, const CompactSize& size) {
        const auto window = use_->find_window(structure, size.clusters);
        if (!window) return false;
        TRY_VOID(cut());  // what is in the way may go behind the end
        Moves moves;
        std::vector<std::uint64_t> sources;
        std::vector<std::uint64_t> streams;
        for (std::uint64_t at = window->first; at < window->end(); ++at) {
            const auto references = use_->references().at(at);
            if ((references.word & References::compressed) != 0) {
                streams.push_back(at);
            } else if (references.word != 0) {
                sources.push_back(at);
            }
        }
        const std::uint64_t wanted = room_for(sources.size() + streams.size());
        auto free = use_->free_runs(window->end(), use_->clusters(), wanted);
        const auto before = use_->free_runs(0, window->first, wanted);
        free.insert(free.begin(), before.begin(), before.end());
        std::erase_if(free, [&](const auto& run) { return !use_->are_counted(run); });
        auto targets = free.begin();
        for (const auto source : sources) {
            while (targets != free.end() && targets->count == 0) ++targets;
            if (targets == free.end()) return false;
            append(moves.clusters, source, targets->first);
            ++targets->first;
            --targets->count;
        }
        if (!streams.empty()) {
            moves.streams = TRY(find_streams(*image_, streams, job_.workers));
            const auto found = moves.streams.size();
            pack_streams(*image_, std::vector(targets, free.end()), moves.streams);
            if (moves.streams.size() < found) return false;
        }
        TRY_VOID(carry_out(moves));
        return true;
    }

    /// The clusters to look for where the contents of `clusters` are to go. Streams may need more than they had.
    static std::uint64_t room_for(std::uint64_t clusters) { return clusters * 4 + 16; }

    // 3. Compressed streams.

    Result<bool> move_streams() {
        const auto size = target();
        std::vector<std::uint64_t> sources;
        std::uint64_t streams = 0;
        each_used_backwards(use_->references(), size.clusters, use_->clusters(),
                            [&](std::uint64_t cluster, References references) {
                                if ((references.word & References::compressed) == 0) return true;
                                streams += references.count();
                                if (!sources.empty() && streams > batch_streams) return false;
                                sources.push_back(cluster);
                                return sources.size() << cluster_bits() < batch_bytes_;
                            });
        if (sources.empty()) return false;
        std::ranges::reverse(sources);
        Moves moves;
        moves.streams = TRY(find_streams(*image_, sources, job_.workers));
        pack_streams(*image_, use_->free_runs(0, size.clusters, room_for(sources.size())), moves.streams);
        if (moves.empty()) return false;
        TRY_VOID(carry_out(moves));
        return true;
    }

    // 4. Single clusters.

    Result<bool> move_clusters() {
        const auto size = target();
        if (total_bytes_ == 0) total_bytes_ = use_->used_behind(size.clusters) << cluster_bits();
        const std::uint64_t most = std::max<std::uint64_t>(1, batch_bytes_ >> cluster_bits());
        std::vector<std::uint64_t> targets;
        each_backwards(use_->references(), 0, std::min(size.clusters, use_->clusters()),
                       [&](std::uint64_t cluster, References references) {
                           if (references.word == 0) targets.push_back(cluster);
                           return targets.size() < most;
                       });
        std::vector<std::uint64_t> sources;
        const auto dropped = use_->blocks_to_drop(size);
        if (!targets.empty()) {
            each_used_backwards(use_->references(), size.clusters, use_->clusters(),
                                [&](std::uint64_t cluster, References references) {
                                    if ((references.word & References::compressed) != 0 ||
                                        use_->in_structure(cluster) || dropped.contains(cluster))
                                        return true;
                                    sources.push_back(cluster);
                                    return sources.size() < targets.size();
                                });
        }
        if (sources.empty()) return false;
        targets.resize(sources.size());
        Moves moves;
        for (std::size_t i = sources.size(); i-- > 0;) append(moves.clusters, sources[i], targets[i]);
        TRY_VOID(carry_out(moves));
        return true;
    }

    const std::shared_ptr<Storage> file_;
    PlannedFile* const planned_;  // `file_` of a dry run; null: changes are made
    const Storage* const data_file_;
    const CompactJob& job_;
    const JobControl& control_;
    const std::uint64_t batch_bytes_;
    const std::shared_ptr<const crypto::SectorCipher> cipher_;  // null: nothing is to be decrypted
    const std::unique_ptr<EncryptedBytes> encryption_;          // the same
    Copying copying_;

    std::unique_ptr<Metadata> image_;
    std::optional<ClusterUse> use_;
    std::optional<std::uint64_t> stuck_at_;  // the size of the file for which no structure finds a place
    std::optional<std::uint64_t> free_end_;  // where the file is to be cut: nothing behind it is in use
    std::uint64_t total_bytes_ = 0;
    std::uint64_t done_bytes_ = 0;
    CompactResult result_;
};

}  // namespace

Result<CompactResult> compact_image(std::shared_ptr<Storage> file, const Storage* data_file, const CompactJob& job,
                                    const JobControl& control, std::uint64_t batch_bytes,
                                    std::shared_ptr<const crypto::SectorCipher> cipher) {
    if (!job.dry_run) {
        return Compaction(std::move(file), nullptr, data_file, job, control, batch_bytes, std::move(cipher)).run();
    }
    const auto planned = TRY(PlannedFile::create(std::move(file), job.memory_bytes));
    return Compaction(planned, planned.get(), data_file, job, control, batch_bytes, std::move(cipher)).run();
}

}  // namespace qcow::qcow2
