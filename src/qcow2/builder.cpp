#include "qcow2/builder.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/endian.h"
#include "base/try.h"
#include "disk/range.h"
#include "format/refcount.h"
#include "qcow2/create_options.h"
#include "storage/growing.h"
#include "storage/zero_bytes.h"

namespace qcow::qcow2 {
namespace {

/// Behind so much plain data, the rest of a cluster that compressed streams have begun is given up.
constexpr std::uint64_t max_stream_distance = 64 * MiB;

}  // namespace

Result<std::unique_ptr<Builder>> Builder::begin(NewImageFiles files, const CreateOptions& options,
                                                const ConvertOptions& convert) {
    auto header = TRY(header_for(options));
    if (convert.compress) {
        if (files.data_file) {
            return fail(Errc::invalid_argument, "compression", "an external data file cannot hold compressed clusters");
        }
        if (options.preallocation != Preallocation::off)
            return fail(Errc::invalid_argument, "compression", "it excludes preallocation");
        if (options.encryption)
            return fail(Errc::invalid_argument, "compression",
                        "it excludes encryption: the format leaves compressed clusters readable");
        TRY(codec::make_compressor(options.compression, convert.level));  // so that a bad level is refused now
    }
    std::optional<luks::NewHeader> encryption;
    if (options.encryption) encryption = TRY(luks::make_header(*options.encryption));
    // Nothing was wrong: what the files hold may go.
    files.image = TRY(as_empty(std::move(files.image)));
    if (files.data_file) {
        TRY_VOID(files.data_file->resize(0));
        // What no entry leads to is not read, and may stay on a device.
        if (options.data_file_raw || options.preallocation != Preallocation::off)
            files.data_file = TRY(as_empty(std::move(files.data_file)));
    }
    // A device that is too small for all of the disk is known at once.
    if (options.preallocation != Preallocation::off)
        TRY_VOID((files.data_file ? files.data_file : files.image)->resize(header.size));
    return std::unique_ptr<Builder>(
        new Builder(std::move(files), options, convert, std::move(header), std::move(encryption)));
}

Builder::Builder(NewImageFiles files, const CreateOptions& options, ConvertOptions convert, format::Header header,
                 std::optional<luks::NewHeader> encryption)
    : files_(std::move(files)),
      convert_(std::move(convert)),
      preallocation_(options.preallocation),
      header_(std::move(header)),
      empty_(header_, preallocation_),
      geometry_(header_),
      refcounts_(*files_.image, header_.cluster_bits, header_.refcount_order),
      luks_(std::move(encryption)),
      encryption_(luks_ ? std::make_unique<EncryptedBytes>(luks_->cipher) : nullptr),
      l1_(std::size_t{header_.l1_entries} * 8),
      l2_(geometry_.cluster_size()) {
    refcounts_.allocate(1);  // the header
    header_.l1_table = refcounts_.allocate(geometry_.clusters(l1_.size()));
    if (luks_) header_.encryption->offset = refcounts_.allocate(geometry_.clusters(luks_->bytes.size()));
}

std::unique_ptr<codec::Compressor> Builder::take_compressor() const {
    {
        const std::lock_guard lock(compressors_mutex_);
        if (!compressors_.empty()) {
            auto compressor = std::move(compressors_.back());
            compressors_.pop_back();
            return compressor;
        }
    }
    return codec::make_compressor(header_.compression, convert_.level).value();  // begin() has seen that it can be made
}

Result<void> Builder::prepare(Piece& piece) const {
    const std::size_t cluster_size = geometry_.cluster_size();
    const std::size_t length = piece.bytes.size();
    // Scratch: room for a stream of each cluster, then the backing file's bytes.
    const std::size_t stream_bytes = convert_.compress ? align_down(length + cluster_size - 1, cluster_size) : 0;
    const std::size_t backing_bytes = convert_.backing ? length : 0;
    if (piece.scratch.size() < stream_bytes + backing_bytes) piece.scratch.resize(stream_bytes + backing_bytes);
    const auto backing = std::span(piece.scratch).subspan(stream_bytes, backing_bytes);
    const bool comparable = convert_.backing && TRY(read_backing(piece.at, backing));
    auto compressor = convert_.compress ? take_compressor() : nullptr;
    for (std::size_t begin = 0; begin < length; begin += cluster_size) {
        prepare_cluster(piece, begin, compressor.get(), comparable ? backing : std::span<const std::byte>());
    }
    if (compressor) {
        const std::lock_guard lock(compressors_mutex_);
        compressors_.push_back(std::move(compressor));
    }
    return {};
}

/// The backing file's bytes; false: they cannot be had, and a salvage does without.
Result<bool> Builder::read_backing(GuestOffset at, std::span<std::byte> to) const {
    const std::uint64_t size = convert_.backing->size();
    const std::size_t there = at.value >= size ? 0 : std::min<std::uint64_t>(to.size(), size - at.value);
    auto read = there == 0 ? Result<void>() : convert_.backing->read(at, to.first(there));
    if (!read && passes_over(read.error())) return false;
    if (!read) return std::unexpected(std::move(read).error());
    std::ranges::fill(to.subspan(there), std::byte{0});
    return true;
}

/// Whether it is damage in the backing file that need not stop a salvage: what cannot be compared is stored.
bool Builder::passes_over(const Error& error) const { return convert_.copy.salvage != nullptr && is_loss(error); }

void Builder::prepare_cluster(Piece& piece, std::size_t begin, codec::Compressor* compressor,
                              std::span<const std::byte> backing) const {
    using Kind = PreparedRun::Kind;
    const std::size_t cluster_size = geometry_.cluster_size();
    const auto bytes =
        std::span<const std::byte>(piece.bytes).subspan(begin, std::min(cluster_size, piece.bytes.size() - begin));
    const auto add = [&](Kind kind, std::span<const std::byte> stored) {
        auto& runs = piece.runs;
        if (kind != Kind::compressed && !runs.empty() && runs.back().kind == kind) {
            auto& last = runs.back();
            last.length += bytes.size();
            if (kind == Kind::data) last.bytes = {last.bytes.data(), last.bytes.size() + stored.size()};
        } else {
            runs.push_back({kind, bytes.size(), stored});
        }
    };
    if (!backing.empty() && std::ranges::equal(bytes, backing.subspan(begin, bytes.size())))
        return add(Kind::nothing, {});
    if (convert_.copy.sparse_bytes != 0 && is_zero(bytes))
        return add(convert_.backing ? Kind::zero : Kind::nothing, {});
    // The last cluster of a disk may be cut short; it is stored as it is.
    if (compressor != nullptr && bytes.size() == cluster_size) {
        const auto room = std::span(piece.scratch).subspan(begin, cluster_size - 1);
        if (const auto stream = compressor->compress(bytes, room); stream != 0) {
            return add(Kind::compressed, room.first(stream));
        }
    }
    add(Kind::data, bytes);
}

Result<void> Builder::write(Piece& piece) {
    GuestOffset at = piece.at;
    for (auto& run : piece.runs) {
        switch (run.kind) {
            case PreparedRun::Kind::nothing: TRY_VOID(add_nothing(at, run.length)); break;
            case PreparedRun::Kind::zero: TRY_VOID(add_zeroes(at, run.length)); break;
            case PreparedRun::Kind::compressed: TRY_VOID(add_compressed(at, run.bytes)); break;
            case PreparedRun::Kind::data: {
                run.place = TRY(add_data(at, run.length));
                if (!encryption_)
                    TRY_VOID((files_.data_file ? files_.data_file : files_.image)->write(run.place, run.bytes));
                break;
            }
        }
        at += run.length;
    }
    return write_pending();
}

Result<void> Builder::write_zeroes(GuestOffset at, std::uint64_t length) {
    const std::uint64_t below_end = convert_.backing ? convert_.backing->size() : 0;
    // Zeros that are there already, as no cluster says otherwise, need no entry; the backing file's data need one.
    const GuestOffset end = at + length;
    while (at < end) {
        std::uint64_t piece = end - at;
        bool shines_through = false;
        if (at.value < below_end) {
            const auto below = convert_.backing->extent(at, std::min(piece, below_end - at.value));
            if (!below && !passes_over(below.error())) return std::unexpected(below.error());
            shines_through = !below || below->kind == Extent::Kind::data;
            piece = below ? below->length : std::max<std::uint64_t>(1, below.error().unreadable.length);
        }
        // In whole clusters: one that only in part would show something is made zeros as a whole.
        const GuestOffset next{std::min(end.value, align_down(at.value + piece + block_size() - 1, block_size()))};
        if (piece < next - at && !shines_through) {
            // The backing file may have data later in the same cluster: making it zeros is right in any case.
            shines_through = true;
        }
        TRY_VOID(shines_through ? add_zeroes(at, next - at) : add_nothing(at, next - at));
        at = next;
    }
    return {};
}

Result<std::uint64_t> Builder::copy_from(GuestOffset at, const Storage& source, HostOffset from, std::uint64_t length) {
    if (convert_.compress || convert_.backing || encryption_) return 0;  // the bytes are to be looked at
    if (preallocation_ == Preallocation::falloc) return 0;               // what is shared has no space of its own
    const auto& target = files_.data_file ? files_.data_file : files_.image;
    // Copied before it is mapped: what was mapped cannot be taken back.
    const HostOffset host = files_.data_file ? HostOffset{at.value} : refcounts_.end();
    const std::uint64_t done = TRY(target->copy_from(source, from, host, length));
    if (done < length) return 0;
    TRY(add_data(at, length));
    return length;
}

Result<void> Builder::complete(const Piece& piece) {
    if (!encryption_) return {};
    for (const auto& run : piece.runs)
        if (run.kind == PreparedRun::Kind::data) TRY_VOID(write_encrypted(run.place, run.bytes));
    return {};
}

Result<void> Builder::write_encrypted(HostOffset host, std::span<const std::byte> bytes) {
    auto& file = files_.data_file ? *files_.data_file : *files_.image;
    TRY_VOID(encryption_->write(file, host, host.value, bytes));
    // The rest of the disk's last cluster shows when the disk grows.
    const std::vector<std::byte> rest(geometry_.clusters(bytes.size()) * geometry_.cluster_size() - bytes.size());
    const HostOffset end = host + bytes.size();
    return encryption_->write(file, end, end.value, rest);
}

/// Maps whole clusters to new host clusters, one behind the other: where the first lies.
Result<HostOffset> Builder::add_data(GuestOffset at, std::uint64_t length, format::L2Entry marks) {
    const std::uint64_t clusters = geometry_.clusters(length);
    const HostOffset host = files_.data_file ? HostOffset{at.value} : refcounts_.allocate(clusters);
    const format::L2Entry first{format::copied_bit | host.value | marks.word, marks.bitmap};
    TRY_VOID(set_entries(at, clusters, first, geometry_.cluster_size()));
    return host;
}

/// Whole clusters that read as what lies below.
Result<void> Builder::add_nothing(GuestOffset at, std::uint64_t length) {
    if (empty_.holes == Recorded::nothing) return {};
    return reserve(at, length, header_.backing_name.empty() ? all_subclusters_allocated : 0);
}

/// Whole clusters of zeros that hide what lies below.
Result<void> Builder::add_zeroes(GuestOffset at, std::uint64_t length) {
    if (empty_.zeros == Recorded::cluster) return reserve(at, length, all_subclusters_zero);
    const auto zero =
        geometry_.extended_l2 ? format::L2Entry{0, all_subclusters_zero} : format::L2Entry{format::zero_bit};
    return set_entries(at, geometry_.clusters(length), zero, 0);
}

/// Maps whole clusters to host clusters that hold nothing yet, as the preallocation asks, table by table.
Result<void> Builder::reserve(GuestOffset at, std::uint64_t length, std::uint64_t bitmap) {
    auto& target = files_.data_file ? *files_.data_file : *files_.image;
    format::L2Entry marks{0, bitmap};
    if (encryption_) {
        // What the file has there does not decrypt to zeros: the entries say them.
        if (!geometry_.extended_l2) marks.word = format::zero_bit;
        if (bitmap != 0) marks.bitmap = all_subclusters_zero;
    }
    const std::uint64_t coverage = geometry_.l2_coverage();
    while (length > 0) {
        const std::uint64_t part = std::min(length, coverage - at.value % coverage);
        const HostOffset host = TRY(add_data(at, part, marks));
        const std::uint64_t stored = files_.data_file ? part : geometry_.clusters(part) * geometry_.cluster_size();
        if (preallocation_ == Preallocation::falloc) TRY_VOID(target.allocate(host, stored));
        if (preallocation_ == Preallocation::full) TRY_VOID(write_zero_bytes(target, host, stored));
        at += part;
        length -= part;
    }
    return {};
}

/// Finds room for a stream: behind the previous one, if what it runs into is free and the refcounts allow it.
HostOffset Builder::place_stream(std::uint64_t length) {
    const std::uint64_t cluster_size = geometry_.cluster_size();
    const std::uint64_t room =
        stream_end_.value == 0 ? 0 : cluster_size - geometry_.offset_in_cluster(stream_end_.value);
    const HostOffset cluster{align_down(stream_end_.value, cluster_size)};
    const bool shareable = room != 0 && room != cluster_size &&
                           streams_in_cluster_ < format::max_refcount(header_.refcount_order) &&
                           refcounts_.end() - cluster <= max_stream_distance;
    const bool fits = length <= room;
    if (!shareable || (!fits && cluster + cluster_size != refcounts_.end())) {
        const HostOffset begin = refcounts_.allocate(1);
        streams_in_cluster_ = 1;
        stream_end_ = begin + length;
        return begin;
    }
    const HostOffset begin = stream_end_;
    refcounts_.add_reference(cluster);
    ++streams_in_cluster_;
    if (!fits) {
        refcounts_.allocate(1);
        streams_in_cluster_ = 1;
    }
    stream_end_ += length;
    return begin;
}

Result<void> Builder::add_compressed(GuestOffset at, std::span<const std::byte> stream) {
    const HostOffset host = place_stream(stream.size());
    if (pending_.empty() || pending_at_ + pending_.size() != host) {
        TRY_VOID(write_pending());
        pending_at_ = host;
    }
    pending_.insert(pending_.end(), stream.begin(), stream.end());
    return set_entries(at, 1, {format::compressed_word({host, stream.size()}, geometry_.cluster_bits)}, 0);
}

Result<void> Builder::write_pending() {
    if (pending_.empty()) return {};
    TRY_VOID(files_.image->write(pending_at_, pending_));
    pending_.clear();
    return {};
}

/// Entries for `clusters` guest clusters, each `step` more than the one before.
Result<void> Builder::set_entries(GuestOffset at, std::uint64_t clusters, format::L2Entry first, std::uint64_t step) {
    const unsigned entry_bytes = geometry_.entry_words() * 8;
    for (; clusters > 0; --clusters, at += geometry_.cluster_size(), first.word += step) {
        if (const auto index = geometry_.l1_index(at); index != l2_index_) {
            TRY_VOID(write_l2_table());
            l2_index_ = index;
        }
        const std::size_t entry = geometry_.l2_index(at) * entry_bytes;
        store_be(l2_, entry, first.word);
        if (geometry_.extended_l2) store_be(l2_, entry + 8, first.bitmap);
        l2_used_ = true;
    }
    return {};
}

Result<void> Builder::write_l2_table() {
    if (!l2_used_) return {};
    TRY_VOID(refcounts_.write_blocks_below(stream_end_.value == 0 ? refcounts_.end() : stream_end_));
    const HostOffset table = refcounts_.allocate(1);
    TRY_VOID(files_.image->write(table, l2_));
    store_be(l1_, l2_index_ * 8, format::copied_bit | table.value);
    std::ranges::fill(l2_, std::byte{0});
    l2_used_ = false;
    return {};
}

Result<void> Builder::preallocate() { return add_nothing({0}, header_.size); }

Result<void> Builder::finish() {
    TRY_VOID(write_l2_table());
    const auto table = TRY(refcounts_.finish());
    header_.refcount_table = table.offset;
    header_.refcount_table_clusters = table.clusters;
    auto& image = *files_.image;
    if (!l1_.empty()) TRY_VOID(image.write(header_.l1_table, l1_));
    if (luks_) TRY_VOID(image.write(header_.encryption->offset, luks_->bytes));
    if (files_.data_file) TRY_VOID(files_.data_file->resize(header_.size));
    TRY_VOID(image.resize(refcounts_.end().value));
    return image.write({0}, TRY(format::encode_header(header_)));
}

}  // namespace qcow::qcow2
