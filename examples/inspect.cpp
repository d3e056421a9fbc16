// Opens an image and the chain below it, and prints what each layer is and how much of the disk it holds.

#include <cstdio>

#include "qcow/copy.h"
#include "qcow/image.h"

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: inspect IMAGE\n");
        return 1;
    }
    auto storage = qcow::open_file(argv[1]);
    if (!storage) {
        std::fprintf(stderr, "%s\n", storage.error().message().c_str());
        return 1;
    }
    // Nothing that the image names is opened unless a gate allows it. This one allows local files.
    auto image = qcow::open_image(*storage, {.gate = qcow::local_files()});
    if (!image) {
        std::fprintf(stderr, "%s\n", image.error().message().c_str());
        return 1;
    }
    auto usage = qcow::measure_usage(**image);
    if (!usage) {
        std::fprintf(stderr, "%s\n", usage.error().message().c_str());
        return 1;
    }
    std::size_t depth = 0;
    for (auto layer = *image; layer; layer = layer->backing(), ++depth) {
        auto info = layer->info();
        if (!info) {
            std::fprintf(stderr, "%s\n", info.error().message().c_str());
            return 1;
        }
        const auto held = depth < usage->layers.size() ? usage->layers[depth] : qcow::LayerUsage{};
        std::printf("%s: %s, %llu bytes, holds %llu\n", info->filename.c_str(), qcow::format_name(info->format).data(),
                    static_cast<unsigned long long>(info->virtual_size),
                    static_cast<unsigned long long>(held.data_bytes + held.compressed_bytes));
    }
}
