#include "interop/image_maker.h"

namespace qcow::test {

ImageMaker::ImageMaker(ImageSpec spec) : spec_(std::move(spec)), random_(Random::named(spec_.name)) {
    for (std::size_t i = 0; i < spec_.layers.size(); ++i) {
        if (spec_.layers[i].size == 0) spec_.layers[i].size = usual_size(spec_.layers[i]);
        create(i);
        stored_.clear();
        if (i + 1 < spec_.layers.size()) fill(i);
    }
    fill_top();
}

std::uint64_t ImageMaker::usual_size(const LayerSpec& layer) {
    return std::max<std::uint64_t>(std::uint64_t{1} << 20, 24 * layer.cluster_size()) +
           sector * random_.between(1, 2 * layer.cluster_size() / sector);
}

std::string ImageMaker::name_of(std::size_t i) const {
    const bool below_root = spec_.layers[i].naming == Naming::from_subdirectory;
    return (below_root ? "sub/" : "") + ("layer" + std::to_string(i)) + "." + spec_.layers[i].format;
}

std::string ImageMaker::backing_name(std::size_t i) const {
    const auto name = name_of(i - 1);
    const auto& format = spec_.layers[i - 1].format;
    switch (spec_.layers[i].naming) {
        case Naming::relative: return name;
        case Naming::absolute: return directory_.file(name);
        case Naming::from_subdirectory: return "../" + name;
        case Naming::file_scheme: return "file:" + name;
        case Naming::json_nested:
            return R"(json:{"driver":")" + format + R"(","file":{"driver":"file","filename":")" +
                   directory_.file(name) + "\"}}";
        case Naming::json_flat:
            return R"(json:{"driver":")" + format + R"(","file.driver":"file","file.filename":")" + name + "\"}";
    }
    return {};
}

std::string ImageMaker::data_file_name(std::size_t i) const {
    const auto name = "layer" + std::to_string(i) + ".data";
    const auto naming = spec_.layers[i].naming;
    return naming == Naming::relative || naming == Naming::file_scheme ? name : directory_.file(name);
}

std::string ImageMaker::options_of(std::size_t i) const {
    const auto& layer = spec_.layers[i];
    std::string options = layer.version == 2 ? "compat=0.10" : "compat=1.1";
    options += ",cluster_size=" + std::to_string(layer.cluster_size());
    if (layer.refcount_bits != 16) options += ",refcount_bits=" + std::to_string(layer.refcount_bits);
    if (layer.codec == Codec::zstd) options += ",compression_type=zstd";
    if (layer.extended_l2) options += ",extended_l2=on";
    if (layer.lazy_refcounts) options += ",lazy_refcounts=on";
    if (!layer.preallocation.empty()) options += ",preallocation=" + layer.preallocation;
    if (layer.data_file != DataFile::none) options += ",data_file=" + data_file_name(i);
    if (layer.data_file == DataFile::raw) options += ",data_file_raw=on";
    return options;
}

void ImageMaker::create(std::size_t i) {
    const auto& layer = spec_.layers[i];
    std::filesystem::create_directories(std::filesystem::path(file(i)).parent_path());
    Arguments arguments = {"create", "-q", "-f", layer.format};
    if (i > 0) arguments.insert(arguments.end(), {"-b", backing_name(i), "-F", spec_.layers[i - 1].format});
    if (layer.format == "qcow2") arguments.insert(arguments.end(), {"-o", options_of(i)});
    arguments.insert(arguments.end(), {name_of(i), std::to_string(layer.size)});
    must_qemu_img(arguments, directory_.path());
}

void ImageMaker::fill(std::size_t i) {
    const auto& layer = spec_.layers[i];
    if (!layer.written) return;
    for (const auto& commands : {compressed_writes(layer), session(layer)}) {
        if (!commands.empty()) must_qemu_io(name_of(i), layer.format, commands, directory_.path());
    }
}

void ImageMaker::fill_top() {
    const auto top = spec_.layers.size() - 1;
    if (spec_.bitmaps) {
        must_qemu_img({"bitmap", "--add", "-g", "64k", name_of(top), "first"}, directory_.path());
        must_qemu_img({"bitmap", "--add", "--disable", name_of(top), "second \xc3\xa4"}, directory_.path());
    }
    fill(top);
    for (unsigned n = 0; n < spec_.snapshots; ++n) {
        snapshots_.push_back("state " + std::to_string(n));
        must_qemu_img({"snapshot", "-q", "-c", snapshots_.back(), name_of(top)}, directory_.path());
        if (spec_.resized) resize_top();
        fill(top);
    }
    if (spec_.crashed) crash_top();
}

void ImageMaker::resize_top() {
    auto& layer = spec_.top();
    layer.size += sector * random_.between(1, 3 * layer.cluster_size() / sector);
    must_qemu_img({"resize", "-q", "-f", layer.format, name_of(spec_.layers.size() - 1), std::to_string(layer.size)},
                  directory_.path());
    // QEMU overwrites the rest of what was the last cluster; what lay behind, VM state perhaps, is in the disk now.
    if (!stored_.empty()) stored_.back() = true;
    stored_.resize((layer.size + layer.cluster_size() - 1) / layer.cluster_size(), spec_.vm_state);
}

void ImageMaker::crash_top() {
    Arguments arguments = {"qemu-io"};
    for (const auto& command : session(spec_.top())) arguments.insert(arguments.end(), {"-c", command});
    arguments.insert(arguments.end(), {"-c", "flush", "-c", "abort", name_of(spec_.layers.size() - 1)});
    const auto finished = run(arguments, directory_.path());
    if (finished.status != 128 + SIGABRT) throw std::runtime_error("did not crash: " + finished.text());
}

ImageMaker::Range ImageMaker::random_range(const LayerSpec& layer) {
    const auto cluster = layer.cluster_size();
    if (random_.chance(30)) {  // whole clusters
        const auto first = random_.below((layer.size + cluster - 1) / cluster);
        const auto count = random_.between(1, 3);
        return {first * cluster, std::min(count * cluster, layer.size - first * cluster)};
    }
    const auto unit = random_.chance(80) ? sector : 1;
    const auto longest = random_.pick({std::uint64_t{16} * sector, cluster, 2 * cluster}) / unit;
    const auto at = random_.below(layer.size / unit) * unit;
    return {at, std::min(random_.between(1, longest) * unit, layer.size - at)};
}

std::vector<std::string> ImageMaker::compressed_writes(const LayerSpec& layer) {
    std::vector<std::string> commands;
    if (layer.codec == Codec::none) return commands;
    const auto cluster = layer.cluster_size();
    const auto contents = contents_for(layer);
    stored_.resize((layer.size + cluster - 1) / cluster, !layer.preallocation.empty());
    const auto count = random_.between(8, 28);
    for (std::uint64_t n = 0; n < count; ++n) {
        const auto c = random_.below(stored_.size());
        if (stored_[c]) continue;
        stored_[c] = true;
        commands.push_back("write -q -c" + contents() +
                           place({c * cluster, std::min(cluster, layer.size - c * cluster)}));
    }
    return commands;
}

std::vector<std::string> ImageMaker::session(const LayerSpec& layer) {
    std::vector<std::string> commands;
    if (layer.size == 0) return commands;
    const auto cluster = layer.cluster_size();
    const auto contents = contents_for(layer);
    stored_.resize((layer.size + cluster - 1) / cluster, !layer.preallocation.empty());
    const auto count = random_.between(10, 36);
    for (std::uint64_t n = 0; n < count; ++n) {
        const auto range = random_range(layer);
        std::fill(stored_.begin() + static_cast<std::ptrdiff_t>(range.at / cluster),
                  stored_.begin() + static_cast<std::ptrdiff_t>((range.at + range.length - 1) / cluster + 1), true);
        const auto kind = random_.below(100);
        if (kind < 65) {
            commands.push_back("write -q" + contents() + place(range));
        } else if (kind < 85) {
            commands.push_back(std::string("write -q -z") + (random_.chance(50) ? " -u" : "") + place(range));
        } else {
            commands.push_back("discard -q" + place(range));
        }
    }
    if (spec_.vm_state && &layer == &spec_.top()) commands.push_back("write -q -b -P 7 0 100k");
    return commands;
}

std::function<std::string()> ImageMaker::contents_for(const LayerSpec& layer) {
    const auto pattern = directory_.file("pattern" + std::to_string(patterns_++));
    write_pattern(pattern, layer.cluster_size());
    return
        [this, pattern] { return random_.chance(40) ? " -s " + pattern : " -P " + std::to_string(random_.below(256)); };
}

std::string ImageMaker::place(const Range& range) {
    return " " + std::to_string(range.at) + " " + std::to_string(range.length);
}

void ImageMaker::write_pattern(const std::string& path, std::uint64_t cluster) {
    const auto bytes = random_.bytes(std::min<std::uint64_t>(2 * cluster, 1 << 20) + 777);
    FILE* out = std::fopen(path.c_str(), "wb");
    if (out == nullptr || std::fwrite(bytes.data(), 1, bytes.size(), out) != bytes.size() || std::fclose(out) != 0)
        throw std::runtime_error("cannot write " + path);
}

}  // namespace qcow::test
