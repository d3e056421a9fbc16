#include "engine/image_kinds.h"

#include "base/bits.h"
#include "disk/layer.h"
#include "luks/volume.h"
#include "operation/commit.h"
#include "qcow2/metadata/directories.h"

namespace qcow::test {

Bytes some_contents(std::uint64_t size, Value value, Random& random) {
    auto result = stamped(0, size / sector_bytes, value);
    for (int i = 0; i < 6; ++i) {
        const auto at = random.below(size / sector_bytes) * sector_bytes;
        const auto length = std::min<std::uint64_t>(size - at, random.between(1, size / 16 + 1));
        std::fill_n(result.begin() + static_cast<std::ptrdiff_t>(at), length / sector_bytes * sector_bytes,
                    std::byte{0});
    }
    return result;
}

std::shared_ptr<Image> raw_disk(Bytes bytes) {
    return value_of(open_image(memory_storage(std::move(bytes)), {.format = Format::raw}));
}

void make_dirty(Storage& file, Random& random) {
    auto bytes = contents_of(file);
    const auto header = value_of(format::parse_header(std::span(bytes).first(value_of(format::header_bytes(bytes)))));
    const auto table = header.refcount_table.value;
    const auto entries = (std::uint64_t{header.refcount_table_clusters} << header.cluster_bits) / 8;
    for (std::uint64_t i = 0; i < entries; ++i) {
        const auto block = load_be<std::uint64_t>(bytes, table + i * 8);
        if (block == 0) continue;
        if (random.chance(30)) {
            store_be<std::uint64_t>(bytes, table + i * 8, 0);
        } else if (random.chance(70)) {
            for (auto& byte : std::span(bytes).subspan(block, header.cluster_size())) {
                if (random.chance(10)) byte = static_cast<std::byte>(random.below(4));
            }
        }
    }
    bytes[79] |= std::byte{1};
    value_of(file.write({0}, bytes));
}

Prepared prepare(const ImageKind& kind, Random& random) {
    auto create = kind.create;
    Prepared result;
    result.contents.resize(create.size);
    auto& files = result.files;
    if (kind.below) {
        const auto size = kind.below->longer ? create.size + create.size / 3 : create.size - create.size / 3;
        auto bytes = some_contents(size / sector_bytes * sector_bytes, value_below, random);
        std::copy_n(bytes.begin(), std::min(bytes.size(), result.contents.size()), result.contents.begin());
        create.backing_name = "base";
        create.backing_format = format_name(kind.below->format);
        files["base"] = memory_storage({}, "base");
        if (kind.below->format == Format::raw) {
            files["base"] = memory_storage(std::move(bytes), "base");
        } else {
            ConvertOptions convert;
            convert.compress = kind.below->compressed;
            value_of(convert_image(*raw_disk(std::move(bytes)), {files["base"], nullptr}, CreateOptions{}, convert));
        }
    }
    files[image_name] = memory_storage({}, image_name);
    NewImageFiles created{files[image_name], nullptr};
    if (!create.data_file_name.empty()) {
        files[create.data_file_name] = memory_storage({}, create.data_file_name);
        created.data_file = files[create.data_file_name];
    }
    if (kind.contents == ImageKind::Contents::none) {
        value_of(create_image(created, create));
    } else {
        result.contents = some_contents(create.size, first_value, random);
        ConvertOptions convert;
        convert.compress = kind.contents == ImageKind::Contents::compressed;
        value_of(convert_image(*raw_disk(result.contents), created, create, convert));
    }
    if (kind.snapshot) {
        const TemporaryDirectory directory;
        save(files, directory.path());
        // It takes no format.
        const auto image = kind.encrypted() ? qemu_image(image_name, true) : Arguments{image_name};
        must_qemu_img(joined_arguments({"snapshot", "-c", "first"}, image), directory.path());
        for (auto& [name, storage] : files) storage = load(directory / name, name);
        result.kept.snapshot = result.contents;
    }
    if (kind.below) result.kept.files["base"] = contents_of(*files["base"]);
    if (kind.dirty) make_dirty(*files[image_name], random);
    return result;
}

Result<Secret> key_of_tests(const KeyRequest& /*request*/) { return Secret(as_bytes(secret_of_tests)); }

Result<std::shared_ptr<const crypto::SectorCipher>> unlock(const Storage& file) {
    const auto start = qcow2::read_first_cluster(file);
    if (!start) return std::unexpected(start.error());
    const auto header = format::parse_header(*start);
    if (!header) return std::unexpected(header.error());
    const auto [at, length] = header->encryption.value();
    return luks::unlock({file, at, length}, Secret(as_bytes(secret_of_tests)), default_kdf_seconds);
}

Result<std::shared_ptr<Image>> open_kind(const ImageKind& kind, const Files& files, bool writable) {
    auto options = kind.open;
    options.writable = writable;
    options.gate = gate_to(files);
    options.format = Format::qcow2;
    options.keys = key_of_tests;
    return open_image(files.at(image_name), options);
}

void commit_kind(const ImageKind& kind, const Files& files) {
    const auto top = value_of(open_kind(kind, files, true));
    dynamic_cast<Layer&>(*top).exchange_backing(nullptr);
    OpenOptions options;
    options.writable = true;
    options.format = kind.below->format;
    const auto base = value_of(open_image(files.at("base"), options));
    CommitJob job;
    job.workers = 1;
    value_of(commit_layers({*top, 1, *base, std::nullopt}, job, {}));
}

std::vector<ImageKind> image_kinds() {
    using Contents = ImageKind::Contents;
    using Below = ImageKind::Below;
    constexpr std::uint64_t KiB = 1024;
    constexpr std::uint64_t MiB = 1024 * KiB;
    std::vector<ImageKind> result;
    const auto add = [&](std::string name, std::uint64_t size, std::uint64_t cluster_size, const auto& change) {
        ImageKind kind;
        kind.name = std::move(name);
        kind.create.size = size;
        kind.create.cluster_size = cluster_size;
        change(kind);
        result.push_back(std::move(kind));
    };
    const auto plain = [](ImageKind&) {};
    const auto v2 = [](ImageKind& kind) { kind.create.version = 2; };

    add("v3_512", MiB + 512, 512, plain);
    add("v3_1k", MiB + 1536, KiB, plain);
    add("v3_4k", 2 * MiB + 512, 4 * KiB, plain);
    add("v3_64k", 4 * MiB - 512, 64 * KiB, plain);
    add("v3_1M", 6 * MiB + 512, MiB, plain);
    add("v3_2M", 8 * MiB, 2 * MiB, plain);
    add("v2_512", MiB, 512, v2);
    add("v2_4k", 2 * MiB + 512, 4 * KiB, v2);
    add("v2_64k", 4 * MiB + 512, 64 * KiB, v2);
    for (const unsigned bits : {1U, 2U, 4U, 8U, 32U, 64U}) {
        add(fmt::format("refcounts_{}", bits), 2 * MiB, bits < 8 ? 64 * KiB : KiB,
            [&](ImageKind& kind) { kind.create.refcount_bits = bits; });
    }
    add("extended_16k", 2 * MiB + 512, 16 * KiB, [](ImageKind& kind) { kind.create.extended_l2 = true; });
    add("extended_64k_over_qcow2", 4 * MiB, 64 * KiB, [](ImageKind& kind) {
        kind.create.extended_l2 = true;
        kind.below = Below{};
    });
    add("extended_128k_compressed", 4 * MiB + 512, 128 * KiB, [](ImageKind& kind) {
        kind.create.extended_l2 = true;
        kind.contents = Contents::compressed;
    });
    add("extended_snapshot", 2 * MiB, 16 * KiB, [](ImageKind& kind) {
        kind.create.extended_l2 = true;
        kind.contents = Contents::plain;
        kind.snapshot = true;
    });
    for (const bool raw : {false, true}) {
        for (const bool extended : {false, true}) {
            add(fmt::format("data_file{}{}", raw ? "_raw" : "", extended ? "_extended" : ""), 2 * MiB + 512, 16 * KiB,
                [&](ImageKind& kind) {
                    kind.create.data_file_name = "data";
                    kind.create.data_file_raw = raw;
                    kind.create.extended_l2 = extended;
                });
        }
    }
    add("data_file_over_raw", 2 * MiB, 64 * KiB, [](ImageKind& kind) {
        kind.create.data_file_name = "data";
        kind.below = Below{Format::raw};
    });
    for (const bool longer : {false, true}) {
        for (const unsigned version : {2U, 3U}) {
            const auto over = [&](Format format) {
                return [=](ImageKind& kind) {
                    kind.create.version = version;
                    kind.below = Below{format, longer};
                };
            };
            const auto what = fmt::format("{}_v{}", longer ? "longer" : "shorter", version);
            add(fmt::format("over_raw_{}", what), 2 * MiB + 512, 4 * KiB, over(Format::raw));
            add(fmt::format("over_qcow2_{}", what), 3 * MiB, 64 * KiB, over(Format::qcow2));
        }
    }
    add("over_compressed", 2 * MiB, 4 * KiB, [](ImageKind& kind) { kind.below = Below{Format::qcow2, true, true}; });
    add("compressed_4k", 2 * MiB, 4 * KiB, [](ImageKind& kind) { kind.contents = Contents::compressed; });
    add("compressed_64k_v2", 4 * MiB + 512, 64 * KiB, [](ImageKind& kind) {
        kind.create.version = 2;
        kind.contents = Contents::compressed;
    });
    add("compressed_zstd", 4 * MiB, 64 * KiB, [](ImageKind& kind) {
        kind.contents = Contents::compressed;
        kind.create.compression = Compression::zstd;
    });
    add("compressed_snapshot", 2 * MiB, 4 * KiB, [](ImageKind& kind) {
        kind.contents = Contents::compressed;
        kind.snapshot = true;
    });
    add("snapshot_4k", 2 * MiB, 4 * KiB, [](ImageKind& kind) {
        kind.contents = Contents::plain;
        kind.snapshot = true;
    });
    add("snapshot_64k_v2", 4 * MiB, 64 * KiB, [](ImageKind& kind) {
        kind.create.version = 2;
        kind.contents = Contents::plain;
        kind.snapshot = true;
    });
    add("preallocated", 2 * MiB, 16 * KiB,
        [](ImageKind& kind) { kind.create.preallocation = Preallocation::metadata; });
    add("lazy", 2 * MiB, 16 * KiB, [](ImageKind& kind) { kind.create.lazy_refcounts = true; });
    add("lazy_snapshot", 2 * MiB, 4 * KiB, [](ImageKind& kind) {
        kind.create.lazy_refcounts = true;
        kind.contents = Contents::plain;
        kind.snapshot = true;
    });
    add("tiny_cache", 2 * MiB, KiB, [](ImageKind& kind) { kind.open.cache_bytes = 1; });
    add("tiny_cache_over_raw", 2 * MiB, 512, [](ImageKind& kind) {
        kind.open.cache_bytes = 1;
        kind.below = Below{Format::raw, true};
    });
    add("writethrough", 2 * MiB, 4 * KiB, [](ImageKind& kind) { kind.open.write.cache = CacheMode::writethrough; });
    add("unsafe", 2 * MiB, 4 * KiB, [](ImageKind& kind) { kind.open.write.cache = CacheMode::unsafe; });
    add("no_discard", 2 * MiB, 4 * KiB, [](ImageKind& kind) { kind.open.write.discard = false; });
    add("detect_zeroes", 2 * MiB, 4 * KiB, [](ImageKind& kind) {
        kind.open.write.detect_zeroes = DetectZeroes::on;
        kind.below = Below{};
    });
    add("detect_zeroes_unmap", 2 * MiB, 4 * KiB, [](ImageKind& kind) {
        kind.open.write.detect_zeroes = DetectZeroes::unmap;
        kind.contents = Contents::compressed;
    });
#ifdef QCOW_HAS_DIGEST  // and so, OpenSSL
    const auto encrypt = [](ImageKind& kind) {
        // Quick to open.
        kind.create.encryption.emplace();
        kind.create.encryption->key = std::make_shared<const Secret>(as_bytes(secret_of_tests));
        kind.create.encryption->cipher = "aes-128";
        kind.create.encryption->iter_time_ms = 1;
    };
    add("encrypted_4k", 2 * MiB + 512, 4 * KiB, encrypt);
    add("encrypted_over_raw_v2", 2 * MiB, 16 * KiB, [&](ImageKind& kind) {
        encrypt(kind);
        kind.create.version = 2;
        kind.below = Below{Format::raw};
    });
    add("encrypted_extended_over_qcow2", 2 * MiB, 64 * KiB, [&](ImageKind& kind) {
        encrypt(kind);
        kind.create.extended_l2 = true;
        kind.below = Below{};
    });
    add("encrypted_snapshot", 2 * MiB, 4 * KiB, [&](ImageKind& kind) {
        encrypt(kind);
        kind.contents = Contents::plain;
        kind.snapshot = true;
    });
    add("encrypted_data_file", 2 * MiB, 16 * KiB, [&](ImageKind& kind) {
        encrypt(kind);
        kind.create.data_file_name = "data";
    });
    add("encrypted_preallocated", 2 * MiB, 16 * KiB, [&](ImageKind& kind) {
        encrypt(kind);
        kind.create.preallocation = Preallocation::metadata;
    });
#endif
    return result;
}

}  // namespace qcow::test
