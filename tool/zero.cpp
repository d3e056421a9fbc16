// qcow zero: fills guest bytes with zeros.

#include "command.h"

namespace tool {
namespace {

struct ZeroOptions {
    Target target;
    std::string offset;
    std::string length;
    bool keep = false;
};

qcow::Result<void> zero(qcow::Image& image, const ZeroOptions& options) {
    const auto at = parse_size(options.offset);
    const auto length = parse_size(options.length);
    if (auto fits = verify_range(image, options.target.path, at, length); !fits) return fits;
    return image.write_zeroes({at}, length, options.keep ? qcow::Disk::Zeroes::keep : qcow::Disk::Zeroes::release);
}

}  // namespace

void declare_zero(CLI::App& root, int& status) {
    const auto options = std::make_shared<ZeroOptions>();
    auto& app = declare(
        root, status, "zero", "Fill bytes of the virtual disk with zeros",
        "The storage of whole clusters is released, or with --keep stays reserved for later writes.\n"
        "Zeros are recorded, so they hide the data of any backing file. The record takes one cluster for each 512 MiB\n"
        "(with clusters of 64k). Version 2 (compat=0.10) cannot record zeros for clusters that are not stored.\n"
        "Examples:\n"
        "  qcow zero disk.qcow2 0 1M         wipe the partition table and what follows\n"
        "  qcow zero --keep disk.qcow2 1G 4G",
        [options] {
            return change(options->target,
                          [&](qcow::Image& image, const std::stop_token&) { return zero(image, *options); });
        });
    add_target_options(app, options->target);
    app.add_option("OFFSET", options->offset, "First byte, as an offset in the virtual disk")
        ->required()
        ->check(size_text);
    app.add_option("LENGTH", options->length, "Number of bytes")->required()->check(size_text);
    app.add_flag("--keep", options->keep, "Keep the storage of the bytes");
}

}  // namespace tool
