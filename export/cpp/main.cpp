// Scores one picture with an exported package, without Python:
//
//     flowad_score model.pt2 part.ppm [CLASS_INDEX]
//
// The picture is a binary PPM (P6, 8 bits per channel, RGB). Statistics of the map and the raw score go to standard output
// as JSON. The exit code is 0 on success, and 1 with one line on standard error on any doubt.
// A package is machine code: check its SHA-256 against the bundle's manifest before running it.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/version.h>

#include "ppm.h"

namespace {

using Metadata = std::unordered_map<std::string, std::string>;

std::string fact(const Metadata& metadata, const std::string& key) {
  const auto found = metadata.find("flowad." + key);
  if (found == metadata.end()) {
    throw std::runtime_error("the package has no entry flowad." + key + "; export it with flowad-export --format aoti");
  }
  return found->second;
}

bool takes(const Metadata& metadata, const std::string& input) {
  return ("," + fact(metadata, "inputs") + ",").find("," + input + ",") != std::string::npos;
}

// The table of location statistics that lies beside a package which takes one: float32, of the shape that it says.
at::Tensor read_location(const std::string& package, const Metadata& metadata) {
  std::vector<int64_t> shape;
  std::stringstream sizes(fact(metadata, "location"));
  for (std::string size; std::getline(sizes, size, ',');) {
    shape.push_back(std::stoll(size));
  }
  std::vector<std::filesystem::path> found;
  for (const auto& file : std::filesystem::directory_iterator(std::filesystem::absolute(package).parent_path())) {
    if (file.path().filename().string().rfind("location-", 0) == 0 && file.path().extension() == ".f32") {
      found.push_back(file.path());
    }
  }
  if (found.size() != 1) {
    throw std::runtime_error("the package takes location statistics: expected one location-*.f32 beside it, found " +
                             std::to_string(found.size()));
  }
  at::Tensor table = at::empty(shape, at::kFloat);
  std::ifstream in(found[0], std::ios::binary);
  const auto bytes = static_cast<std::streamsize>(table.nbytes());
  if (!in.read(static_cast<char*>(table.data_ptr()), bytes) || in.peek() != std::ifstream::traits_type::eof()) {
    throw std::runtime_error(found[0].string() + ": not of " + std::to_string(bytes) + " bytes");
  }
  return table;
}

// The package checks none of its inputs, so everything is checked here.
void check(const Metadata& metadata, const Image& image, bool has_class) {
  const std::string torch = fact(metadata, "torch");
  if (torch.substr(0, torch.find('+')) != TORCH_VERSION) {
    throw std::runtime_error("the package is for torch " + torch + ", this program was built with " TORCH_VERSION);
  }
  const std::string size = fact(metadata, "frame_size");
  const std::string got = std::to_string(image.height) + "x" + std::to_string(image.width);
  if (size != "any" && size != got) {
    throw std::runtime_error("the package takes " + size + " frames (height x width), got " + got);
  }
  if (image.height < 16 || image.width < 16) {
    throw std::runtime_error("expected a picture of at least 16x16 pixels, got " + got);
  }
  const bool conditional = takes(metadata, "classes");
  if (conditional && !has_class) {
    throw std::runtime_error("the model is conditional: give the class index as the third argument");
  }
  if (!conditional && has_class) {
    throw std::runtime_error("the model is unconditional: omit the class index");
  }
}

int64_t class_index(const std::string& text, const Metadata& metadata) {
  const int64_t count = std::stoll(fact(metadata, "classes"));
  size_t used = 0;
  int64_t index = -1;
  try {
    index = std::stoll(text, &used);
  } catch (const std::exception&) {
  }
  if (used != text.size() || index < 0 || index >= count) {
    throw std::runtime_error("class " + text + ": expected an index in 0.." + std::to_string(count - 1));
  }
  return index;
}

void print(const at::Tensor& map, const at::Tensor& score) {
  const float* cell = map.const_data_ptr<float>();
  const int64_t count = map.numel();
  double sum = 0;
  double squares = 0;
  int64_t lowest = 0;
  int64_t highest = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(cell[i])) {
      throw std::runtime_error("the map is not finite: no verdict");
    }
    sum += cell[i];
    lowest = cell[i] < cell[lowest] ? i : lowest;
    highest = cell[i] > cell[highest] ? i : highest;
  }
  const double mean = sum / static_cast<double>(count);
  for (int64_t i = 0; i < count; ++i) {
    squares += (cell[i] - mean) * (cell[i] - mean);
  }
  std::string scores;
  for (int64_t i = 0; i < score.numel(); ++i) {
    char text[32];
    std::snprintf(text, sizeof text, "%s%.9g", i ? ", " : "", score.const_data_ptr<float>()[i]);
    scores += text;
  }
  const int64_t width = map.size(-1);
  std::printf(
      "{\"height\": %lld, \"width\": %lld, \"min\": %.9g, \"max\": %.9g, \"mean\": %.9g, \"std\": %.9g, "
      "\"peak_row\": %lld, \"peak_column\": %lld, \"score\": [%s]}\n",
      static_cast<long long>(map.size(-2)), static_cast<long long>(width), cell[lowest], cell[highest], mean,
      std::sqrt(squares / static_cast<double>(count)), static_cast<long long>(highest / width),
      static_cast<long long>(highest % width), scores.c_str());
}

void run(const std::string& package, const std::string& picture, const char* given_class) {
  using torch::inductor::AOTIModelPackageLoader;
  Image image = read_ppm(picture);
  const Metadata metadata = AOTIModelPackageLoader::load_metadata_from_package(package, "model");
  check(metadata, image, given_class != nullptr);
  const at::Device device(fact(metadata, "device"));
  // By default torch lets float32 convolutions run in TF32 on a GPU.
  at::globalContext().setAllowTF32CuDNN(fact(metadata, "precision") == "tf32");

  const c10::InferenceMode guard;
  AOTIModelPackageLoader loader(package);
  const auto bytes = at::TensorOptions().dtype(at::kByte);
  std::vector<at::Tensor> inputs = {
      at::from_blob(image.pixels.data(), {1, image.height, image.width, 3}, bytes).to(device)};
  if (given_class != nullptr) {
    const auto index = at::TensorOptions().dtype(at::kLong).device(device);
    inputs.push_back(at::full({1}, class_index(given_class, metadata), index));
  }
  if (takes(metadata, "location")) {
    inputs.push_back(read_location(package, metadata).to(device));
  }
  const std::vector<at::Tensor> outputs = loader.run(inputs);
  print(outputs.at(0).to(at::kCPU).contiguous(), outputs.at(1).to(at::kCPU).contiguous());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3 && argc != 4) {
    std::fprintf(stderr, "usage: %s MODEL.pt2 PICTURE.ppm [CLASS_INDEX]\n", argv[0]);
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
