#include "image/hostile_image.h"

namespace qcow::hostile {

void append(Bytes& out, std::uint64_t value, unsigned bytes) {
    for (unsigned i = bytes; i > 0; --i) out.push_back(static_cast<std::byte>(value >> (8 * (i - 1))));
}

void append(Bytes& out, std::string_view text) {
    for (const char c : text) out.push_back(static_cast<std::byte>(c));
}

void HostileImage::fill(std::uint64_t at, std::uint64_t words, std::uint64_t word) {
    Bytes bytes(words * 8);
    for (std::size_t i = 0; i < bytes.size(); i += 8) store_be(bytes, i, word);
    file.segments.push_back({at, std::move(bytes)});
}

void HostileImage::write_refcounts(std::uint64_t clusters) {
    file.write_word(cluster(refcount_table), cluster(2));
    Bytes block;
    for (std::uint64_t i = 0; i < clusters; ++i) append(block, 1, 2);
    file.write(cluster(2), block);
}

fuzz::SparseFile HostileImage::finish(std::uint64_t clusters) {
    Bytes h;
    append(h, format::magic, 4);
    append(h, version, 4);
    h.resize(20);
    append(h, cluster_bits, 4);
    append(h, size, 8);
    append(h, crypt, 4);
    append(h, l1_entries, 4);
    append(h, cluster(l1_table), 8);
    append(h, cluster(refcount_table), 8);
    append(h, refcount_table_clusters, 4);
    append(h, snapshots, 4);
    append(h, cluster(snapshot_table), 8);
    if (version == 3) {
        append(h, incompatible | (zstd ? 8U : 0U), 8);
        append(h, 0, 8);
        append(h, autoclear, 8);
        append(h, refcount_order, 4);
        append(h, 112, 4);
        append(h, zstd ? 1 : 0, 1);
        h.resize(112);
    }
    for (const auto& extension : extensions) {
        append(h, extension.type, 4);
        append(h, extension.data.size(), 4);
        h.insert(h.end(), extension.data.begin(), extension.data.end());
        h.resize((h.size() + 7) / 8 * 8);
    }
    append(h, 0, 8);
    if (!backing_name.empty()) {
        store_be<std::uint64_t>(h, 8, h.size());
        store_be<std::uint32_t>(h, 16, static_cast<std::uint32_t>(backing_name.size()));
        append(h, backing_name);
    }
    file.segments.push_back({0, std::move(h)});
    if (!file.fixed_size) file.fixed_size = std::max(file.size(), cluster(clusters));
    return file;
}

void HostileImage::set_backing_format(std::string_view name) {
    Bytes data;
    append(data, name);
    extensions.push_back({0xe2792aca, std::move(data)});
}

}  // namespace qcow::hostile
