// qcow bitmap: changes the persistent bitmaps of an image.

#include <fmt/format.h>

#include <algorithm>

#include "failure.h"
#include "qcow/bitmaps.h"
#include "running.h"

namespace tool {
namespace {

using Kind = qcow::BitmapAction::Kind;

struct BitmapOptions {
    Target target;
    Running running;
    std::string bitmap;
    std::vector<std::string> merged;
    std::string granularity;
    Source source;
};

struct ActionOption {
    std::string_view name;
    Kind kind;
};
constexpr ActionOption action_options[] = {{"--add", Kind::add},         {"--remove", Kind::remove},
                                           {"--clear", Kind::clear},     {"--enable", Kind::enable},
                                           {"--disable", Kind::disable}, {"--merge", Kind::merge}};

/// The actions, in the order of the command line.
qcow::Result<std::vector<qcow::BitmapAction>> actions_of(const CLI::App& app, const BitmapOptions& options) {
    std::vector<qcow::BitmapAction> actions;
    std::size_t merged = 0;
    const auto has = [&](Kind kind) {
        return std::ranges::find(actions, kind, &qcow::BitmapAction::kind) != actions.end();
    };
    for (const auto* option : app.parse_order()) {
        const auto found = std::ranges::find(action_options, "--" + option->get_single_name(), &ActionOption::name);
        if (found == std::end(action_options)) continue;
        qcow::BitmapAction action{.kind = found->kind, .bitmap = options.bitmap};
        if (action.kind == Kind::merge) action.source = options.merged.at(merged++);
        if (action.kind == Kind::add && !options.granularity.empty())
            action.granularity = parse_size(options.granularity);
        actions.push_back(std::move(action));
    }
    if (actions.empty()) {
        return refuse("",
                      "the action is missing; say one or more of --add, --remove, --clear, --enable, --disable and "
                      "--merge SOURCE");
    }
    if (!options.granularity.empty() && !has(Kind::add)) return refuse("--granularity", "works only with --add");
    if (!options.source.path.empty() && !has(Kind::merge)) return refuse("--source-file", "works only with --merge");
    if (!options.source.format.empty() && options.source.path.empty())
        return refuse("--source-format", "works only with --source-file");
    return actions;
}

/// The bitmaps of an image that a server has open.
qcow::Result<int> change_running(const Running& running, const std::vector<qcow::BitmapAction>& actions) {
    Json all = Json::array();
    for (const auto& action : actions) {
        const auto found = std::ranges::find(action_options, action.kind, &ActionOption::kind);
        Json data = {{action.kind == Kind::merge ? "target" : "name", action.bitmap}};
        if (action.kind == Kind::merge) data["bitmaps"] = Json::array({action.source});
        if (action.granularity != 0) data["granularity"] = action.granularity;
        if (!running.image.empty()) data["node"] = running.image;
        all.push_back({{"type", fmt::format("block-dirty-bitmap-{}", found->name.substr(2))}, {"data", data}});
    }
    QCOW_TRY(execute(running.socket, "transaction", {{"actions", all}}));
    return ok;
}

qcow::Result<int> run(const CLI::App& app, BitmapOptions& options) {
    options.bitmap = QCOW_TRY(value_without_image(options.running, options.target.path, options.bitmap, "BITMAP"));
    if (options.running.named()) {
        if (!options.source.path.empty())
            return refuse("--source-file", "works only without --control: the server opens no files");
        return change_running(options.running, QCOW_TRY(actions_of(app, options)));
    }
    qcow::BitmapJob job{.image = QCOW_TRY(spec_of(options.target)), .actions = QCOW_TRY(actions_of(app, options))};
    QCOW_TRY_VOID(verify_is_not_stdin(options.target.path));
    if (!options.source.path.empty()) {
        QCOW_TRY_VOID(name_source(options.source, options.source.path));
        QCOW_TRY_VOID(verify_is_not_stdin(options.source.path));
        options.source.untrusted = options.target.untrusted;
        job.source = QCOW_TRY(spec_of(options.source));
        job.source->follow = false;
    }
    const StopOnSignals signals;
    QCOW_TRY_VOID(qcow::change_bitmaps(job, {.warn = warn_on_stderr()}));
    return ok;
}

}  // namespace

void declare_bitmap(CLI::App& root, int& status) {
    const auto options = std::make_shared<BitmapOptions>();
    const auto self = std::make_shared<CLI::App*>();
    auto& app = declare(
        root, status, "bitmap", "Add, remove, clear, enable, disable or merge the persistent bitmaps of an image",
        "A bitmap records which parts of the disk have changed. The actions are done in the order of the command "
        "line.\n"
        "If one of them fails, none has an effect. A crash leaves the old bitmaps or the new ones.\n"
        "A bitmap that is in use was not saved by its last writer. It can only be removed.\n"
        "qcow info lists the bitmaps.\n"
        "Examples:\n"
        "  qcow bitmap --add disk.qcow2 monday                    record changes from now on\n"
        "  qcow bitmap --add --disable -g 4k disk.qcow2 copy      an empty one that records nothing\n"
        "  qcow bitmap --merge monday --merge tuesday disk.qcow2 copy\n"
        "  qcow bitmap --add --merge monday -b old.qcow2 disk.qcow2 monday    copied from another image",
        [options, self] { return run(**self, *options); });
    *self = &app;
    add_target_options(app, options->target)->required(false);
    app.add_option("BITMAP", options->bitmap, "Name of the bitmap")->check(name_text);
    add_running_options(app, options->running);
    app.add_flag("--add")->description("Make a bitmap, enabled and without dirty bits");
    app.add_flag("--remove")->description("Remove the bitmap");
    app.add_flag("--clear")->description("Make all bits clean");
    app.add_flag("--enable")->description("Record changes of the disk from now on");
    app.add_flag("--disable")->description("Record no changes any more");
    app.add_option("--merge", options->merged, "Add the dirty bits of this bitmap, which keeps its own")
        ->type_name("SOURCE")
        ->allow_extra_args(false)
        ->check(name_text);
    app.add_option("-g,--granularity", options->granularity,
                   "With --add: bytes of the disk per bit, a power of two from 512 to 2G (default: the cluster size,\n"
                   "but 4k to 64k)")
        ->type_name("SIZE")
        ->check(size_text);
    app.add_option("-b,--source-file", options->source.path,
                   "With --merge: the image that has the bitmaps SOURCE (default: IMAGE)")
        ->type_name("FILE")
        ->check(name_text);
    add_format_option(app, options->source.format, "-F,--source-format",
                      "Format of the source file (default: guessed from its contents)");
}

}  // namespace tool
