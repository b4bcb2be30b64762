// Judges one picture with the ONNX graph of a bundle, by ONNX Runtime on the CPU, without Python:
//
//     flowad_judge BUNDLE part.ppm [CLASS]
//
// The picture is a binary PPM (P6, 8 bits per channel, RGB); the class is a name of the model, or an index. Raw score,
// score and verdict go to standard output as JSON: good, anomalous, or invalid, for a frame that cannot be judged. The
// exit code is 0 on success, and 1 with one line on standard error when there is no answer.
// Check the graph's SHA-256 against the bundle's manifest before running it.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <filesystem>

#include <nlohmann/json.hpp>
#include <onnxruntime_cxx_api.h>

#include "../ppm.h"

namespace {

using Json = nlohmann::json;

Json read_manifest(const std::filesystem::path& bundle) {
  std::ifstream in(bundle / "manifest.json");
  if (!in) {
    throw std::runtime_error(bundle.string() + ": no bundle: there is no manifest.json");
  }
  Json manifest = Json::parse(in);
  if (manifest.at("schema_version") != 1) {
    throw std::runtime_error(bundle.string() + ": manifest of another schema, expected 1");
  }
  return manifest;
}

// The graph's file of the first artefact for ONNX Runtime.
std::filesystem::path find_graph(const std::filesystem::path& bundle, const Json& manifest) {
  for (const auto& [name, artefact] : manifest.at("artefacts").items()) {
    // A graph that holds its location statistics as constants is the server's.
    if (artefact.at("engine") == "onnxruntime" && !artefact.at("details").contains("constant_location")) {
      for (const auto& [file, hash] : artefact.at("files").items()) {
        if (std::filesystem::path(file).extension() == ".onnx") {
          return bundle / file;
        }
      }
    }
  }
  throw std::runtime_error(bundle.string() + ": has no ONNX graph; export it with flowad-export make --format onnx");
}

// Why a frame cannot be judged, "" for one that can; the same rule as flowad_fast/stages/frames.py.
std::string doubt(const Image& image) {
  const auto [first, last] = std::minmax_element(image.pixels.begin(), image.pixels.end());
  const int low = *first;
  const int high = *last;
  if (high - low <= 2) {
    return high <= 16 ? "the frame is black" : low >= 250 ? "the frame is saturated" : "the frame is uniform";
  }
  return high <= 16 ? "the frame is black" : low >= 240 ? "the frame is saturated" : "";
}

void check_size(const Json& manifest, const Image& image) {
  const Json& size = manifest.at("frame_size");
  if (!size.is_null() && (size.at(0) != image.height || size.at(1) != image.width)) {
    throw std::runtime_error("the bundle takes " + size.dump() + " frames (height, width), got " +
                             std::to_string(image.height) + "x" + std::to_string(image.width));
  }
  if (image.height < 16 || image.width < 16) {
    throw std::runtime_error("expected a picture of at least 16x16 pixels");
  }
}

struct Class {
  int64_t index = 0;
  std::string label;  // what the calibration calls it, "" for an unconditional model
};

Class find_class(const Json& model, const char* given) {
  const Json& velocity = model.at("velocity");
  if (!velocity.at("use_class_labels").get<bool>()) {
    if (given != nullptr) {
      throw std::runtime_error("the model is unconditional: omit the class");
    }
    return {};
  }
  if (given == nullptr) {
    throw std::runtime_error("the model is conditional: give the class");
  }
  const Json& names = model.at("class_names");
  for (int64_t i = 0; i < velocity.at("num_classes").get<int64_t>(); ++i) {
    const std::string label = names.empty() ? std::to_string(i) : names.at(i).get<std::string>();
    if (given == label) {
      return {i, label};
    }
  }
  throw std::runtime_error(std::string("class ") + given + " is not in the model");
}

// The score, and whether it is above the threshold of the frame's class.
std::pair<float, bool> decide(const Json& manifest, const std::string& label, const std::vector<float>& raw) {
  const Json& calibration = manifest.at("calibration");
  if (calibration.is_null() || !calibration.at("classes").contains(label)) {
    throw std::runtime_error("not calibrated, so there is no verdict; flowad-export calibrate BUNDLE GOOD_FOLDER");
  }
  const Json& one = calibration.at("classes").at(label);
  float score = raw.at(0);
  if (raw.size() == 2) {  // the aggregate diff+sum, each term relative to its range over good parts
    double sum = 0;
    for (size_t i = 0; i < 2; ++i) {
      const Json& range = one.at("ranges").at(i);
      const double low = range.at("low");
      const double width = range.at("high").get<double>() - low;
      sum += (raw[i] - low) / std::max<double>(width, std::numeric_limits<float>::min());
    }
    score = static_cast<float>(sum);
  }
  return {score, score > one.at("threshold").get<double>()};
}

// The table of location statistics, for bundles that have one: float32, classes x 2 x height x width of the map.
std::vector<float> read_location(const std::filesystem::path& bundle, const Json& manifest, const int64_t shape[4]) {
  const std::string file = manifest.at("location").at("file");
  std::vector<float> table(static_cast<size_t>(shape[0] * shape[1] * shape[2] * shape[3]));
  std::ifstream in(bundle / file, std::ios::binary);
  const auto bytes = static_cast<std::streamsize>(table.size() * sizeof(float));
  if (!in.read(reinterpret_cast<char*>(table.data()), bytes) || in.peek() != std::ifstream::traits_type::eof()) {
    throw std::runtime_error((bundle / file).string() + ": missing, or not of " + std::to_string(bytes) + " bytes");
  }
  return table;
}

std::vector<float> values(const Ort::Value& tensor) {
  const float* data = tensor.GetTensorData<float>();
  return {data, data + tensor.GetTensorTypeAndShapeInfo().GetElementCount()};
}

void run(const std::filesystem::path& bundle, const std::string& picture, const char* given_class) {
  const Json manifest = read_manifest(bundle);
  Image image = read_ppm(picture);
  check_size(manifest, image);
  Class one = find_class(manifest.at("model"), given_class);

  Ort::Env environment(ORT_LOGGING_LEVEL_ERROR, "flowad");
  Ort::Session session(environment, find_graph(bundle, manifest).c_str(), Ort::SessionOptions{});
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const int64_t shape[] = {1, image.height, image.width, 3};
  const int64_t batch[] = {1};
  std::vector<Ort::Value> inputs;
  inputs.push_back(Ort::Value::CreateTensor<uint8_t>(memory, image.pixels.data(), image.pixels.size(), shape, 4));
  std::vector<const char*> names = {"frames"};
  if (given_class != nullptr) {
    inputs.push_back(Ort::Value::CreateTensor<int64_t>(memory, &one.index, 1, batch, 1));
    names.push_back("classes");
  }
  const Json& velocity = manifest.at("model").at("velocity");
  const int64_t cells[] = {velocity.at("use_class_labels").get<bool>() ? velocity.at("num_classes").get<int64_t>() : 1, 2,
                           velocity.at("height").get<int64_t>(), velocity.at("width").get<int64_t>()};
  std::vector<float> table;
  if (manifest.contains("location") && !manifest.at("location").is_null()) {
    table = read_location(bundle, manifest, cells);
    inputs.push_back(Ort::Value::CreateTensor<float>(memory, table.data(), table.size(), cells, 4));
    names.push_back("location");
  }
  const char* outputs[] = {"map", "score"};
  const auto got = session.Run(Ort::RunOptions{}, names.data(), inputs.data(), inputs.size(), outputs, 2);

  const std::vector<float> map = values(got.at(0));
  const std::vector<float> raw = values(got.at(1));
  std::string reason = doubt(image);
  const auto finite = [](float value) { return std::isfinite(value); };
  if (reason.empty() && !(std::all_of(map.begin(), map.end(), finite) && std::all_of(raw.begin(), raw.end(), finite))) {
    reason = "the map is not finite";
  }
  Json answer = {{"raw_score", raw}, {"verdict", "invalid"}, {"reason", reason}};
  if (reason.empty()) {
    const auto [score, anomalous] = decide(manifest, one.label, raw);
    answer["score"] = score;
    answer["verdict"] = anomalous ? "anomalous" : "good";
  }
  std::printf("%s\n", answer.dump().c_str());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 && argc != 4) {
    std::fprintf(stderr, "usage: %s BUNDLE PICTURE.ppm [CLASS]\n", argv[0]);
    return 1;
  }
  try {
    run(argv[1], argv[2], argc == 4 ? argv[3] : nullptr);
  } catch (const std::exception& error) {
    const std::string text = error.what();
    std::fprintf(stderr, "%s\n", text.substr(0, text.find('\n')).c_str());
    return 1;
  }
  return 0;
}
