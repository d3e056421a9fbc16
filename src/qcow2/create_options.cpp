#include "qcow2/create_options.h"

#include <fmt/format.h>

#include <bit>

#include "base/bits.h"
#include "base/try.h"
#include "format/geometry.h"
#include "luks/volume.h"

namespace qcow::qcow2 {
namespace {

std::unexpected<Error> impossible(std::string_view option, std::string why) {
    return fail(Errc::invalid_argument, fmt::format("option {}", option), std::move(why));
}

Result<void> verify(const CreateOptions& o) {
    if (o.version != 2 && o.version != 3)
        return impossible("compat", fmt::format("version {} is neither 2 nor 3", o.version));
    if (!std::has_single_bit(o.cluster_size) || o.cluster_size < 512 || o.cluster_size > 2 * MiB) {
        return impossible("cluster_size", fmt::format("{} is not a power of two from 512 to 2M", o.cluster_size));
    }
    if (!std::has_single_bit(o.refcount_bits) || o.refcount_bits > 64) {
        return impossible("refcount_bits", fmt::format("{} is not a power of two from 1 to 64", o.refcount_bits));
    }
    if (o.version < 3) {
        constexpr std::string_view needs_v3 = "version 2 does not have it; it needs compat=1.1";
        if (o.refcount_bits != 16) return impossible("refcount_bits", "version 2 has 16; other widths need compat=1.1");
        if (o.lazy_refcounts) return impossible("lazy_refcounts", std::string(needs_v3));
        if (o.extended_l2) return impossible("extended_l2", std::string(needs_v3));
        if (o.compression != Compression::zlib) return impossible("compression_type", std::string(needs_v3));
        if (!o.data_file_name.empty()) return impossible("data_file", std::string(needs_v3));
    }
    if (o.extended_l2 && o.cluster_size < 16 * KiB)
        return impossible("extended_l2", "it needs clusters of at least 16k");
    if (o.data_file_raw && o.data_file_name.empty()) return impossible("data_file_raw", "there is no data_file");
    if (o.data_file_raw && !o.backing_name.empty()) {
        return impossible("data_file_raw", "a raw data file holds everything by itself; it excludes a backing file");
    }
    if (o.data_file_raw && o.encryption) {
        return impossible("data_file_raw", "other programs could not read the data, which are encrypted");
    }
    if (o.encryption && o.version < 3 && o.preallocation != Preallocation::off) {
        return impossible("preallocation",
                          "version 2 cannot say that encrypted clusters hold nothing yet; it needs "
                          "compat=1.1");
    }
    if (!o.backing_name.empty() && o.preallocation != Preallocation::off && !o.extended_l2) {
        return impossible("preallocation", "it would hide the backing file under zeros; with extended_l2 it does not");
    }
    return {};
}

}  // namespace

Result<format::Header> header_for(const CreateOptions& o) {
    TRY_VOID(verify(o));
    format::Header h;
    h.version = o.version;
    h.cluster_bits = static_cast<unsigned>(std::countr_zero(o.cluster_size));
    h.size = rounded_size(o.size);
    h.refcount_order = static_cast<unsigned>(std::countr_zero(o.refcount_bits));
    h.compression = o.compression;
    if (o.compression != Compression::zlib) h.incompatible |= format::incompatible::compression_type;
    if (o.extended_l2) h.incompatible |= format::incompatible::extended_l2;
    if (o.lazy_refcounts) h.compatible |= format::compatible::lazy_refcounts;
    if (!o.data_file_name.empty()) {
        h.incompatible |= format::incompatible::external_data;
        h.data_file_name = o.data_file_name;
        if (o.data_file_raw) h.autoclear |= format::autoclear::raw_external_data;
    }
    h.backing_name = o.backing_name;
    if (!o.backing_format.empty()) h.backing_format = o.backing_format;
    if (o.encryption) {
        h.crypt = format::Crypt::luks;
        h.encryption.emplace();
        h.encryption->length = TRY(luks::header_bytes(*o.encryption));
    }

    const auto l1_entries = divide_up(h.size, format::Geometry(h).l2_coverage());
    if (l1_entries * 8 > format::max_l1_bytes) {
        return impossible(
            "size", fmt::format("{} bytes are too much for clusters of {}: the L1 table would be larger than 32 MiB; "
                                "use a larger cluster_size",
                                o.size, o.cluster_size));
    }
    h.l1_entries = static_cast<std::uint32_t>(l1_entries);
    TRY(format::encode_header(h));  // whether the names fit
    return h;
}

}  // namespace qcow::qcow2
