#include "interop/matrix_cases.h"

namespace qcow::test {

std::string size_name(unsigned bits) {
    const auto bytes = std::uint64_t{1} << bits;
    return bits >= 20   ? fmt::format("{}M", bytes >> 20)
           : bits >= 10 ? fmt::format("{}k", bytes >> 10)
                        : fmt::format("{}", bytes);
}

std::string codec_name(Codec codec) { return codec == Codec::none ? "plain" : codec == Codec::zlib ? "zlib" : "zstd"; }

std::vector<ImageSpec> Cases::all() {
    cluster_sizes();
    refcount_widths();
    extended_l2();
    data_files();
    backing_chains();
    snapshots();
    preallocation();
    features();
    version_1();
    sizes();
    mixtures();
    return std::move(cases_);
}

void Cases::add(ImageSpec spec, std::string name) {
    spec.name = std::move(name);
    cases_.push_back(std::move(spec));
}

void Cases::cluster_sizes() {
    for (unsigned version : {2U, 3U}) {
        for (unsigned bits = 9; bits <= 21; ++bits) {
            for (const auto codec : codecs) {
                if (version == 2 && codec == Codec::zstd) continue;
                add_layer({.version = version, .cluster_bits = bits, .codec = codec},
                          fmt::format("v{}_cluster_{}_{}", version, size_name(bits), codec_name(codec)));
            }
        }
    }
}

void Cases::refcount_widths() {
    for (unsigned width = 1; width <= 64; width *= 2) {
        for (const unsigned bits : {9U, 12U, 16U}) {
            for (const auto codec : {Codec::none, Codec::zlib})
                add_layer({.cluster_bits = bits, .refcount_bits = width, .codec = codec},
                          fmt::format("refcount_{}_cluster_{}_{}", width, size_name(bits), codec_name(codec)));
            if (width == 1) continue;  // leaves nothing to share
            ImageSpec shared{.layers = {{.cluster_bits = bits, .refcount_bits = width}}, .snapshots = 2};
            add(shared, fmt::format("refcount_{}_cluster_{}_snapshots", width, size_name(bits)));
        }
    }
}

void Cases::extended_l2() {
    for (unsigned bits = 14; bits <= 21; ++bits) {
        for (const auto codec : codecs)
            add_layer({.cluster_bits = bits, .codec = codec, .extended_l2 = true},
                      fmt::format("extended_l2_cluster_{}_{}", size_name(bits), codec_name(codec)));
    }
}

void Cases::data_files() {
    for (const auto kind : {DataFile::plain, DataFile::raw}) {
        const auto* name = kind == DataFile::raw ? "raw_data_file" : "data_file";
        for (const unsigned bits : {9U, 12U, 16U, 21U}) {
            add_layer({.cluster_bits = bits, .data_file = kind}, fmt::format("{}_cluster_{}", name, size_name(bits)));
            if (bits < 14) continue;
            add_layer({.cluster_bits = bits, .extended_l2 = true, .data_file = kind},
                      fmt::format("{}_cluster_{}_extended_l2", name, size_name(bits)));
        }
    }
    for (const bool extended : {false, true}) {
        add({.layers = {{}, {.extended_l2 = extended, .data_file = DataFile::plain}}},
            fmt::format("data_file_over_backing{}", extended ? "_extended_l2" : ""));
        add({.layers = {{.data_file = DataFile::raw}, {.extended_l2 = extended}}},
            fmt::format("backing_with_data_file{}", extended ? "_extended_l2" : ""));
    }
}

void Cases::backing_chains() {
    const std::array<unsigned, 4> cluster_bits = {16, 9, 12, 18};
    const std::array<std::string, 4> lengths = {"same", "shorter", "longer", "odd"};
    std::size_t turn = 0;
    for (unsigned depth = 1; depth <= 3; ++depth) {
        for (const std::string base : {"qcow2", "raw", "qcow"}) {
            for (const auto& length : lengths) {
                for (const bool extended : {false, true}) {
                    ImageSpec spec;
                    spec.layers.assign(depth + 1, {});
                    for (std::size_t i = 0; i <= depth; ++i, ++turn) {
                        auto& layer = spec.layers[i];
                        layer.format = i == 0 ? base : "qcow2";
                        layer.version = extended || turn % 4 != 1 ? 3 : 2;
                        layer.cluster_bits = extended && i != 0 ? 14 + static_cast<unsigned>(turn % 4)
                                                                : cluster_bits[turn % cluster_bits.size()];
                        layer.extended_l2 = extended && i != 0;
                        if (i != 0) layer.naming = namings[turn % namings.size()];
                        if (turn % 3 == 0 && layer.format == "qcow2")
                            layer.codec = layer.version == 3 && turn % 2 == 0 ? Codec::zstd : Codec::zlib;
                        layer.size = layer_size(length, i);
                    }
                    add(spec,
                        fmt::format("backing_{}_over_{}_{}{}", depth, base, length, extended ? "_extended_l2" : ""));
                }
            }
        }
    }
    for (const auto naming : namings) {
        ImageSpec spec{.layers = {{}, {.naming = naming}}};
        add(spec, fmt::format("backing_named_{}", static_cast<int>(naming)));
    }
    add({.layers = {{}, {.written = false}, {.written = false}}}, "backing_nothing_written_above");
}

std::uint64_t Cases::layer_size(const std::string& length, std::size_t i) {
    constexpr std::uint64_t MiB = 1 << 20;
    if (length == "shorter") return 3 * MiB - i * 700 * 1024;  // overlays shorter than what is below
    if (length == "longer") return MiB + i * 700 * 1024;
    if (length == "odd") return (i % 2 == 0 ? 2 * MiB : 3 * MiB) - 512 * (2 * i + 1);
    return 2 * MiB;
}

void Cases::snapshots() {
    for (const unsigned version : {2U, 3U}) {
        for (const auto codec : codecs) {
            if (version == 2 && codec == Codec::zstd) continue;
            for (const unsigned bits : {9U, 16U}) {
                ImageSpec spec{.layers = {{.version = version, .cluster_bits = bits, .codec = codec}}, .snapshots = 3};
                add(spec, fmt::format("snapshots_v{}_cluster_{}_{}", version, size_name(bits), codec_name(codec)));
            }
        }
    }
    for (const bool extended : {false, true}) {
        const auto* suffix = extended ? "_extended_l2" : "";
        const LayerSpec layer{.codec = Codec::zlib, .extended_l2 = extended};
        add({.layers = {{}, layer}, .snapshots = 2}, fmt::format("snapshots_over_backing{}", suffix));
        add({.layers = {layer}, .snapshots = 3, .resized = true}, fmt::format("snapshots_resized{}", suffix));
        add({.layers = {layer}, .snapshots = 2, .vm_state = true}, fmt::format("snapshots_vm_state{}", suffix));
    }
    add({.layers = {{.cluster_bits = 9}}, .snapshots = 3, .resized = true, .vm_state = true},
        "snapshots_resized_vm_state_cluster_512");
    add({.layers = {{.cluster_bits = 9}}, .snapshots = 40}, "snapshots_40");
}

void Cases::preallocation() {
    for (const std::string mode : {"metadata", "falloc", "full"}) {
        const std::vector<std::pair<std::string, LayerSpec>> kinds = {
            {"v3_64k", {}},
            {"v2_64k", {.version = 2}},
            {"v3_512", {.cluster_bits = 9}},
            {"extended_l2", {.extended_l2 = true}},
            {"data_file", {.data_file = DataFile::plain}},
            {"raw_data_file", {.data_file = DataFile::raw}},
        };
        for (auto [name, layer] : kinds) {
            layer.preallocation = mode;
            add_layer(layer, fmt::format("preallocation_{}_{}", mode, name));
        }
    }
    add_layer({.preallocation = "metadata", .written = false}, "preallocation_metadata_nothing_written");
    add({.layers = {{.preallocation = "metadata"}}, .snapshots = 1}, "preallocation_metadata_snapshot");
}

void Cases::features() {
    for (const unsigned bits : {9U, 16U}) {
        const LayerSpec lazy{.cluster_bits = bits, .codec = Codec::zlib, .lazy_refcounts = true};
        add_layer(lazy, fmt::format("lazy_refcounts_cluster_{}", size_name(bits)));
        add({.layers = {lazy}, .snapshots = 1}, fmt::format("lazy_refcounts_snapshot_{}", size_name(bits)));
        add({.layers = {lazy}, .crashed = true}, fmt::format("lazy_refcounts_crashed_{}", size_name(bits)));
        add({.layers = {{.cluster_bits = bits}}, .crashed = true}, fmt::format("crashed_{}", size_name(bits)));
        add({.layers = {{.cluster_bits = bits}}, .bitmaps = true}, fmt::format("bitmaps_{}", size_name(bits)));
        add({.layers = {{.cluster_bits = bits}}, .snapshots = 1, .bitmaps = true},
            fmt::format("bitmaps_snapshot_{}", size_name(bits)));
        add({.layers = {{.cluster_bits = bits}}, .bitmaps = true, .crashed = true},
            fmt::format("bitmaps_crashed_{}", size_name(bits)));
    }
    add({.layers = {{.extended_l2 = true}}, .bitmaps = true}, "bitmaps_extended_l2");
    add({.layers = {{.data_file = DataFile::plain}}, .bitmaps = true}, "bitmaps_data_file");
}

void Cases::version_1() {
    // Its clusters: 4 KiB, and 512 bytes over a backing file.
    const LayerSpec plain{.format = "qcow", .cluster_bits = 12};
    const LayerSpec compressed{.format = "qcow", .cluster_bits = 12, .codec = Codec::zlib};
    add_layer(plain, "v1_plain");
    add_layer(compressed, "v1_zlib");
    add_layer({.format = "qcow", .cluster_bits = 12, .written = false}, "v1_nothing_written");
    for (const std::string base : {"raw", "qcow", "qcow2"}) {
        for (const auto codec : {Codec::none, Codec::zlib}) {
            LayerSpec over{.format = "qcow", .cluster_bits = 9, .codec = codec};
            add({.layers = {{.format = base, .cluster_bits = 12}, over}},
                fmt::format("v1_over_{}_{}", base, codec_name(codec)));
            add({.layers = {{.format = base, .cluster_bits = 12}, over, {.naming = Naming::absolute}}},
                fmt::format("v3_over_v1_over_{}_{}", base, codec_name(codec)));
        }
    }
}

void Cases::sizes() {
    for (const unsigned bits : {9U, 12U, 16U, 21U}) {
        const auto cluster = std::uint64_t{1} << bits;
        for (const auto codec : {Codec::none, Codec::zlib}) {
            const auto suffix = fmt::format("cluster_{}_{}", size_name(bits), codec_name(codec));
            const LayerSpec layer{.cluster_bits = bits, .codec = codec};
            const auto sized = [&](std::uint64_t size, const char* name) {
                auto one = layer;
                one.size = size;
                add_layer(one, fmt::format("size_{}_{}", name, suffix));
            };
            sized(512, "sector");
            sized(5 * cluster, "whole_clusters");
            sized(5 * cluster + 512, "sector_more");
            if (bits > 9) sized(5 * cluster - 512, "sector_less");
            // Several L2 tables, far apart.
            sized(std::min(std::uint64_t{1} << 38, cluster * cluster / 8 * 3 + 3 * 512), "large");
        }
    }
    add_layer({.size = std::uint64_t{1} << 40, .written = true}, "size_terabyte");
    add_layer({.extended_l2 = true, .size = (std::uint64_t{3} << 30) + 512}, "size_large_extended_l2");
}

void Cases::mixtures() {
    for (unsigned n = 0; n < 48; ++n) add({}, fmt::format("mixture_{:02}", n));
}

ImageSpec mixed(ImageSpec spec) {
    auto random = Random::named("spec of " + spec.name);
    spec.layers.assign(random.between(1, 4), {});
    for (std::size_t i = 0; i < spec.layers.size(); ++i) {
        auto& layer = spec.layers[i];
        const bool is_top = i + 1 == spec.layers.size();
        if (i == 0 && !is_top) layer.format = random.pick({"qcow2", "qcow2", "raw", "qcow"});
        layer.version = random.chance(20) ? 2 : 3;
        layer.extended_l2 = layer.version == 3 && random.chance(40);
        layer.cluster_bits = static_cast<unsigned>(random.between(layer.extended_l2 ? 14 : 9, 18));
        if (layer.format == "qcow") layer.cluster_bits = 12;
        if (layer.version == 3) layer.refcount_bits = 1U << random.between(0, 6);
        if (layer.version == 3 && random.chance(15)) {
            layer.data_file = i == 0 && random.chance(50) ? DataFile::raw : DataFile::plain;
        } else if (layer.format != "raw") {
            layer.codec = random.pick(codecs);
            if (layer.codec == Codec::zstd && (layer.version == 2 || layer.format != "qcow2"))
                layer.codec = Codec::zlib;
        }
        layer.lazy_refcounts = layer.version == 3 && random.chance(20);
        layer.naming = i == 0 ? Naming::relative : random.pick(namings);
        layer.size = 512 * random.between(1, 6000);
    }
    auto& top = spec.top();
    if (spec.layers.size() == 1 && random.chance(25)) top.preallocation = random.pick({"metadata", "falloc", "full"});
    if (top.data_file == DataFile::none && top.refcount_bits >= 4 && random.chance(50)) {
        spec.snapshots = static_cast<unsigned>(random.between(1, 3));
        // Compressed clusters share host clusters: with snapshots, narrow refcounts overflow.
        if (top.codec != Codec::none) top.refcount_bits = std::max(top.refcount_bits, 16U);
        spec.resized = top.version == 3 && random.chance(30);
        spec.vm_state = top.size > 0 && random.chance(30);
    }
    spec.bitmaps = top.version == 3 && !spec.resized && random.chance(25);
    return spec;
}

}  // namespace qcow::test
