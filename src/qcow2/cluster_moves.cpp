#include "qcow2/cluster_moves.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <utility>

#include "base/endian.h"
#include "base/invariant.h"
#include "base/try.h"
#include "base/workers.h"
#include "format/header_edit.h"
#include "qcow2/metadata/directories.h"
#include "qcow2/refcount_edits.h"
#include "qcow2/repair_directories.h"
#include "qcow2/sound_visitor.h"

namespace qcow::qcow2 {
namespace {

constexpr std::uint64_t move_piece_bytes = 2 * MiB;

/// The first move that ends behind `cluster`.
auto move_behind(const Moves& moves, std::uint64_t cluster) {
    return std::ranges::lower_bound(moves.clusters, cluster, {},
                                    [](const ClusterMove& move) { return move.from + move.count - 1; });
}

/// Writes the entries of a walk that lead to what moves. It reads the tables at their old places, and writes to the new
/// ones.
class Redirection : public SoundVisitor {
public:
    Redirection(const Metadata& metadata, const Moves& moves)
        : SoundVisitor(metadata),
          moves_(moves),
          cluster_bits_(metadata.geometry().cluster_bits),
          l2_entry_bytes_(std::uint64_t{8} * metadata.geometry().entry_words()) {}

    Result<void> reference(const Reference& reference) override {
        switch (reference.kind) {
            case Structure::compressed: return redirect_stream(reference);
            case Structure::data:
                TRY_VOID(redirect(reference, reference.word, l2_entry_bytes_));
                return redirect_to_streams(reference);
            case Structure::l2_table: return redirect(reference, reference.word, 8);
            case Structure::refcount_block:
            case Structure::bitmap_bits: return redirect(reference, reference.at.value, 8);
            default: return {};  // the header and the directories lead to it
        }
    }

    [[nodiscard]] HostOffset new_place(HostOffset at) const {
        return {(moved(moves_, at.value >> cluster_bits_) << cluster_bits_) + (at.value & low_bits(cluster_bits_))};
    }

private:
    /// Entries that lead to clusters one behind the other. The first has `word`.
    Result<void> redirect(const Reference& reference, std::uint64_t word, std::uint64_t entry_bytes) {
        const std::uint64_t first = reference.at.value >> cluster_bits_;
        const std::uint64_t end = first + (reference.bytes >> cluster_bits_);
        for (auto move = move_behind(moves_, first); move != moves_.clusters.end() && move->from < end; ++move) {
            const std::uint64_t begin = std::max(first, move->from);
            const std::uint64_t count = std::min(end, move->from + move->count) - begin;
            const std::uint64_t to = (move->to + (begin - move->from)) << cluster_bits_;
            TRY_VOID(write_entries(reference.place.at + (begin - first) * entry_bytes,
                                   (word & ~format::offset_mask) | to, count, entry_bytes));
        }
        return {};
    }

    Result<void> write_entries(HostOffset at, std::uint64_t word, std::uint64_t count, std::uint64_t entry_bytes) {
        if (entry_bytes > 8 || count == 1) {
            for (std::uint64_t i = 0; i < count; ++i)
                TRY_VOID(write_word(at + i * entry_bytes, word + (i << cluster_bits_)));
            return {};
        }
        std::vector<std::byte> words(count * 8);
        for (std::uint64_t i = 0; i < count; ++i) store_be(words, i * 8, word + (i << cluster_bits_));
        return metadata_.file().write(new_place(at), words);
    }

    /// Entries of data clusters that are compressed now.
    Result<void> redirect_to_streams(const Reference& reference) {
        const std::uint64_t first = reference.at.value >> cluster_bits_;
        const std::uint64_t end = first + (reference.bytes >> cluster_bits_);
        for (auto one = std::ranges::lower_bound(moves_.compressed, first, {}, &CompressedCluster::from);
             one != moves_.compressed.end() && one->from < end; ++one) {
            std::array<std::byte, 16> entry = {};
            store_be(entry, 0, format::compressed_word({one->to, one->stream.size()}, cluster_bits_));
            const auto at = reference.place.at + (one->from - first) * l2_entry_bytes_;
            TRY_VOID(metadata_.file().write(new_place(at), std::span(entry).first(l2_entry_bytes_)));
        }
        return {};
    }

    Result<void> redirect_stream(const Reference& reference) {
        const HostOffset at = reference.at;
        const auto move =
            std::ranges::lower_bound(moves_.streams, std::pair(at, reference.bytes), {},
                                     [](const StreamMove& stream) { return std::pair(stream.from, stream.length); });
        if (move == moves_.streams.end() || move->from != at || move->length != reference.bytes) return {};
        const std::uint64_t mask = low_bits(format::compressed_offset_bits(cluster_bits_));
        return write_word(reference.place.at, (reference.word & ~mask) | move->to.value);
    }

    Result<void> write_word(HostOffset at, std::uint64_t word) {
        std::array<std::byte, 8> bytes = {};
        store_be(bytes, 0, word);
        return metadata_.file().write(new_place(at), bytes);
    }

    const Moves& moves_;
    const unsigned cluster_bits_;
    const std::uint64_t l2_entry_bytes_;
};

class CarryingOut {
public:
    CarryingOut(const Metadata& metadata, const Moves& moves, const CountedImage& counted, const Copying& copying,
                unsigned workers)
        : metadata_(metadata),
          moves_(moves),
          counted_(counted),
          copying_(copying),
          workers_(workers),
          cluster_bits_(metadata.geometry().cluster_bits),
          redirection_(metadata, moves) {}

    Result<void> run() {
        if (auto copied = copy_to_targets(); !copied) {
            // Nothing leads to the targets, so they need not be leaked.
            static_cast<void>(free_targets());
            return copied;
        }
        TRY_VOID(redirect_entries());
        TRY_VOID(redirect_directories());
        TRY_VOID(metadata_.file().flush());
        TRY_VOID(redirect_header());
        for (auto& block : counted_.blocks) block = redirection_.new_place(block);
        TRY_VOID(overwrite_key_slots());
        return free_sources();
    }

private:
    Result<void> copy_to_targets() {
        TRY_VOID(count_targets());
        TRY_VOID(copy_contents());
        return copying_.flush();
    }

    /// They were free before.
    Result<void> free_targets() {
        RefcountEdits refcounts(metadata_, counted_.blocks);
        const auto free = [&](std::uint64_t cluster, std::uint64_t) { return refcounts.set(cluster, 0); };
        TRY_VOID(each_moved_cluster([&](std::uint64_t, std::uint64_t to) { return refcounts.set(to, 0); }));
        TRY_VOID(each_stream_cluster(&StreamMove::to, free));
        TRY_VOID(each_new_stream_cluster(free));
        TRY_VOID(refcounts.write());
        return metadata_.file().flush();
    }

    template <class Visit>
    Result<void> each_moved_cluster(const Visit& visit) {
        for (const auto& move : moves_.clusters) {
            for (std::uint64_t i = 0; i < move.count; ++i) TRY_VOID(visit(move.from + i, move.to + i));
        }
        return {};
    }

    /// Calls visit(cluster, references) for each cluster in which the data of a compressed one will lie.
    template <class Visit>
    Result<void> each_new_stream_cluster(const Visit& visit) {
        for (const auto& one : moves_.compressed) {
            const std::uint64_t last = (one.to.value + one.stream.size() - 1) >> cluster_bits_;
            for (std::uint64_t cluster = one.to.value >> cluster_bits_; cluster <= last; ++cluster)
                TRY_VOID(visit(cluster, one.references));
        }
        return {};
    }

    /// Calls visit(cluster, references) for each cluster in which a stream lies at this place.
    template <class Visit>
    Result<void> each_stream_cluster(HostOffset StreamMove::* place, const Visit& visit) {
        for (const auto& stream : moves_.streams) {
            const HostOffset at = stream.*place;
            const std::uint64_t last = (at.value + stream.length - 1) >> cluster_bits_;
            for (std::uint64_t cluster = at.value >> cluster_bits_; cluster <= last; ++cluster)
                TRY_VOID(visit(cluster, stream.references));
        }
        return {};
    }

    Result<void> count_targets() {
        RefcountEdits refcounts(metadata_, counted_.blocks);
        TRY_VOID(each_moved_cluster([&](std::uint64_t from, std::uint64_t to) -> Result<void> {
            INVARIANT(TRY(refcounts.get(to)) == 0);
            return refcounts.set(to, TRY(refcounts.get(from)));
        }));
        const auto add_stream = [&](std::uint64_t cluster, std::uint64_t count) -> Result<void> {
            TRY_VOID(counted_.references.add(cluster, 1, count, References::compressed));
            return refcounts.set(cluster, TRY(refcounts.get(cluster)) + count);
        };
        TRY_VOID(each_stream_cluster(&StreamMove::to, add_stream));
        TRY_VOID(each_new_stream_cluster(add_stream));
        return refcounts.write();
    }

    struct Piece {
        HostOffset from;
        HostOffset to;
        std::uint64_t length = 0;
        Copying::Contents contents = Copying::Contents::data;
    };

    Result<void> copy_contents() {
        for (const auto& one : moves_.compressed) TRY_VOID(copying_.write(one.to, one.stream));
        const auto pieces = find_pieces();
        std::atomic<std::size_t> next = 0;
        return run_workers(copying_.workers, [&](unsigned) -> Result<void> {
            for (std::size_t i = next++; i < pieces.size(); i = next++) {
                const auto& piece = pieces[i];
                TRY_VOID(copying_.copy(piece.from, piece.to, piece.length, piece.contents));
            }
            return {};
        });
    }

    [[nodiscard]] std::vector<Piece> find_pieces() const {
        std::vector<Piece> pieces;
        const auto add = [&](HostOffset from, HostOffset to, std::uint64_t length, Copying::Contents contents) {
            for (std::uint64_t done = 0; done < length; done += move_piece_bytes)
                pieces.push_back({from + done, to + done, std::min(length - done, move_piece_bytes), contents});
        };
        for (const auto& move : moves_.clusters) {
            const auto is_metadata = [&](std::uint64_t i) {
                return (counted_.references.at(move.from + i).word & (References::metadata | References::l2_table)) !=
                       0;
            };
            for (std::uint64_t done = 0; done < move.count;) {
                std::uint64_t end = done + 1;
                while (end < move.count && is_metadata(end) == is_metadata(done)) ++end;
                add({(move.from + done) << cluster_bits_}, {(move.to + done) << cluster_bits_},
                    (end - done) << cluster_bits_,
                    is_metadata(done) ? Copying::Contents::metadata : Copying::Contents::data);
                done = end;
            }
        }
        for (auto stream = moves_.streams.begin(); stream != moves_.streams.end();) {
            // Neighbours that move as far.
            const auto first = stream;
            std::uint64_t end = first->from.value + first->length;
            for (++stream; stream != moves_.streams.end() && stream->from.value <= end &&
                           stream->to - first->to == stream->from - first->from && first->to < stream->to;
                 ++stream)
                end = std::max(end, stream->from.value + stream->length);
            add(first->from, first->to, end - first->from.value, Copying::Contents::streams);
        }
        return pieces;
    }

    Result<void> redirect_entries() {
        WalkOptions options;
        options.workers = workers_;
        TRY(walk(metadata_, TRY(walked_length(metadata_)), options, redirection_));
        return {};
    }

    /// The fields of the snapshot table and of the bitmap directory that lead to tables. They are aligned, so none of
    /// them crosses a sector.
    Result<void> redirect_directories() {
        const auto state = metadata_.state();
        HostOffset at = state.snapshot_table;
        for (const auto& snapshot : TRY(read_snapshots(metadata_)).entries) {
            if (snapshot.l1_entries != 0) TRY_VOID(redirect_field(at, snapshot.l1_table));
            at += snapshot.encoded_bytes;
        }
        if (!state.bitmaps_consistent()) return {};
        at = state.bitmaps->directory;
        for (const auto& bitmap : TRY(read_bitmaps(metadata_))) {
            TRY_VOID(redirect_field(at, bitmap.table));
            at += bitmap.encoded_bytes;
        }
        return {};
    }

    Result<void> redirect_field(HostOffset field, HostOffset target) {
        const auto to = redirection_.new_place(target);
        if (to == target) return {};
        std::array<std::byte, 8> bytes = {};
        store_be(bytes, 0, to.value);
        return metadata_.file().write(redirection_.new_place(field), bytes);
    }

    Result<void> redirect_header() {
        const auto old = metadata_.state();
        auto state = old;
        if (state.l1_entries != 0) state.l1_table = redirection_.new_place(old.l1_table);
        state.refcount_table = redirection_.new_place(old.refcount_table);
        if (state.snapshot_count != 0) state.snapshot_table = redirection_.new_place(old.snapshot_table);
        bool changed = state.l1_table != old.l1_table || state.refcount_table != old.refcount_table ||
                       state.snapshot_table != old.snapshot_table;
        format::HeaderEdit edit(TRY(read_first_cluster(metadata_.file())));
        edit.set_state(state);
        if (old.bitmaps_consistent()) {
            auto bitmaps = *old.bitmaps;
            bitmaps.directory = redirection_.new_place(bitmaps.directory);
            if (bitmaps.directory != old.bitmaps->directory) {
                edit.set_extension(format::ExtensionType::bitmaps, format::encode_bitmaps_extension(bitmaps));
                changed = true;
            }
        }
        if (auto encryption = metadata_.header().encryption) {
            const auto at = encryption->offset;
            encryption->offset = redirection_.new_place(at);
            if (encryption->offset != at) {
                edit.set_extension(format::ExtensionType::encryption, format::encode_encryption_extension(*encryption));
                changed = true;
            }
        }
        return changed ? write_header(metadata_.file(), TRY(edit.steps())) : Result<void>();
    }

    /// A key slot that is erased later would live on in their old place.
    Result<void> overwrite_key_slots() {
        const auto& encryption = metadata_.header().encryption;
        if (!encryption || redirection_.new_place(encryption->offset) == encryption->offset) return {};
        TRY_VOID(copying_.write(encryption->offset, std::vector<std::byte>(encryption->length)));
        return copying_.flush();
    }

    Result<void> free_sources() {
        auto& references = counted_.references;
        RefcountEdits refcounts(metadata_, counted_.blocks);
        TRY_VOID(each_moved_cluster([&](std::uint64_t from, std::uint64_t to) -> Result<void> {
            TRY_VOID(references.set(to, references.at(from)));
            TRY_VOID(references.set(from, {}));
            return refcounts.set(from, 0);
        }));
        TRY_VOID(each_stream_cluster(
            &StreamMove::from,
            [&](std::uint64_t cluster, std::uint64_t count) -> Result<void> {
                auto left = references.at(cluster);
                left.word = left.count() <= count ? 0 : left.word - static_cast<std::uint32_t>(count);
                TRY_VOID(references.set(cluster, left));
                return refcounts.set(cluster, TRY(refcounts.get(cluster)) - count);
            }));
        for (const auto& one : moves_.compressed) {
            TRY_VOID(references.set(one.from, {}));
            TRY_VOID(refcounts.set(one.from, 0));
        }
        return refcounts.write();
    }

    const Metadata& metadata_;
    const Moves& moves_;
    const CountedImage& counted_;
    const Copying& copying_;
    const unsigned workers_;
    const unsigned cluster_bits_;
    Redirection redirection_;
};

}  // namespace

void Moves::sort() {
    std::ranges::sort(compressed, {}, &CompressedCluster::from);
    std::ranges::sort(clusters, {}, &ClusterMove::from);
    std::ranges::sort(streams, {}, [](const StreamMove& move) { return std::pair(move.from, move.length); });
}

std::uint64_t moved(const Moves& moves, std::uint64_t cluster) {
    const auto move = move_behind(moves, cluster);
    if (move == moves.clusters.end() || cluster < move->from) return cluster;
    return move->to + (cluster - move->from);
}

Result<void> carry_out(const Metadata& metadata, const Moves& moves, const CountedImage& counted,
                       const Copying& copying, unsigned workers) {
    return CarryingOut(metadata, moves, counted, copying, workers).run();
}

}  // namespace qcow::qcow2
