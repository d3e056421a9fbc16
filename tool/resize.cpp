// qcow resize: changes the virtual size.

#include "qcow/resize.h"

#include <fmt/format.h>

#include "running.h"

namespace tool {
namespace {

struct ResizeOptions {
    Target target;
    Running running;
    std::string size;
    bool shrink = false;
};

bool is_relative(const std::string& size) { return size.starts_with('+') || size.starts_with('-'); }

/// A size, or a change of the size with a sign in front.
const CLI::Validator new_size_text(
    [](std::string& text) {
        auto size = text.substr(is_relative(text) ? 1 : 0);
        return size_text(size);
    },
    "");

/// The image of a running server. A relative size counts from what it has.
qcow::Result<int> resize_running(const ResizeOptions& options, const std::string& size) {
    const auto refuse = [&](std::string what) {
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, size, std::move(what)});
    };
    const auto image = QCOW_TRY(query(options.running));
    const auto now = image.at("image").at("virtual-size").get<std::uint64_t>();
    std::uint64_t bytes = parse_size(size.substr(is_relative(size) ? 1 : 0));
    if (size.starts_with('-') && bytes > now) return refuse(fmt::format("the disk has only {} bytes", now));
    if (is_relative(size)) bytes = size.starts_with('-') ? now - bytes : now + bytes;
    if (bytes < now && !options.shrink) {
        return refuse(
            fmt::format("the disk has {} bytes, and the rest would be lost; add --shrink to allow that", now));
    }
    QCOW_TRY(execute(options.running, "block_resize", {{"size", bytes}, {"shrink", options.shrink}}));
    return ok;
}

qcow::Result<int> run(const ResizeOptions& options) {
    using enum qcow::ResizeJob::Change;
    auto size = QCOW_TRY(value_without_image(options.running, options.target.path, options.size, "SIZE"));
    if (auto error = new_size_text(size); !error.empty())
        return std::unexpected(qcow::Error{qcow::Errc::invalid_argument, "SIZE", error});
    if (options.running.named()) return resize_running(options, size);
    QCOW_TRY_VOID(verify_is_not_stdin(options.target.path));
    const qcow::ResizeJob job{
        .image = QCOW_TRY(spec_of(options.target)),
        .change = size.starts_with('+')   ? grow
                  : size.starts_with('-') ? shrink
                                          : to,
        .bytes = parse_size(size.substr(is_relative(size) ? 1 : 0)),
        .shrink = options.shrink ? qcow::Image::Shrink::allow : qcow::Image::Shrink::refuse,
    };
    const StopOnSignals signals;
    QCOW_TRY(qcow::resize(job, {.warn = warn_on_stderr()}));
    return ok;
}

}  // namespace

void declare_resize(CLI::App& root, int& status) {
    const auto options = std::make_shared<ResizeOptions>();
    auto& app = declare(
        root, status, "resize", "Change the virtual size",
        "New bytes read as zeros. Shrinking loses the bytes past the new end, and cuts unused clusters off the file.\n"
        "Bitmaps get the new size, and show no changes in new bytes. Sizes are rounded up to multiples of 512.\n"
        "Examples:\n"
        "  qcow resize disk.qcow2 20G\n"
        "  qcow resize disk.qcow2 +1.5G           1.5 GiB larger\n"
        "  qcow resize --shrink disk.qcow2 -512M  512 MiB smaller",
        [options] { return run(*options); });
    add_target_options(app, options->target)->required(false);
    app.add_option("SIZE", options->size, "New size, or with + or - in front the change of the size");
    add_running_options(app, options->running);
    app.add_flag("--shrink", options->shrink, "Allow a smaller size");
}

}  // namespace tool
